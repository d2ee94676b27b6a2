//! `retune quantize`: a model with its linears in 4 bits, in bitsandbytes' form.

use anyhow::{Context, Result};
use retune_model::export::MergeOptions;
use retune_model::quantize;
use retune_quant::Encoding;
use serde_json::json;

use super::print_json;
use crate::args::{QuantizeArgs, QuantizeTo};
use crate::fetch;
use crate::memory::human;
use crate::progress::bytes_bar;
use crate::session::Base;

/// Writes the quantized model, a weight after the other.
pub fn run(args: &QuantizeArgs) -> Result<()> {
    let encoding = match args.to {
        QuantizeTo::Nf4 => Encoding::NF4,
        QuantizeTo::Nf4Double => Encoding::NF4_DOUBLE,
        QuantizeTo::Fp4 => Encoding::FP4,
    };
    let base = Base::open(&fetch::resolve(&args.model)?)?;
    base.check_finite()?;
    let bar = bytes_bar()?;
    let most = MergeOptions::default().max_shard_bytes;
    let written = quantize::write(&base.checkpoint, encoding, args.dtype, most, &args.out, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let report = written.with_context(|| format!("{} cannot be quantized", args.model))?;
    if args.json {
        return print_json(&json!({
            "out": args.out,
            "bytes": report.bytes,
            "shards": report.shards,
            "linears": report.linears,
            "bits_per_parameter": report.bits_per_parameter,
        }));
    }
    outln!("quantized      {}  ({} in {} file(s))", args.out.display(), human(report.bytes), report.shards);
    outln!("linears        {} in {encoding}, {:.2} bits a parameter", report.linears, report.bits_per_parameter);
    outln!("try            retune generate --model {} \"Hello\"", args.out.display());
    Ok(())
}
