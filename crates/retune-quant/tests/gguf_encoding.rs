//! Encoding against the `gguf` Python package, bit for bit (`goldens/make_gguf.py`), and against what llama.cpp's quantizer loses where that
//! encodes nothing (`goldens/make_gguf_k.py`).

use retune_quant::Format;
use safetensors::SafeTensors;

fn file(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/goldens/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn f32s(data: &[u8]) -> Vec<f32> {
    data.as_chunks::<4>().0.iter().map(|&word| f32::from_le_bytes(word)).collect()
}

fn encoded(format: Format, values: &[f32]) -> Option<Vec<u8>> {
    let mut bytes = vec![0xAA; format.bytes_for(1, values.len()).unwrap()];
    format.encode_row(values, &mut bytes).then_some(bytes)
}

#[test]
fn codes_are_those_of_the_gguf_package() {
    let file = file("gguf_encoded.safetensors");
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let values = tensors.tensor("values").unwrap();
    let (rows, values) = (values.shape()[0], f32s(values.data()));
    let cols = values.len() / rows;
    for format in [Format::F16, Format::BF16, Format::Q4_0, Format::Q4_1, Format::Q5_0, Format::Q5_1, Format::Q8_0] {
        let expected = tensors.tensor(&format!("{format}.bytes")).unwrap();
        let expected = expected.data().chunks_exact(format.bytes_for(1, cols).unwrap());
        for (row, (values, expected)) in values.chunks_exact(cols).zip(expected).enumerate() {
            assert_eq!(encoded(format, values).unwrap(), expected, "{format} row {row}");
        }
    }
    assert_eq!(encoded(Format::F32, &[1.5, -0.0]).unwrap(), [1.5f32.to_le_bytes(), (-0.0f32).to_le_bytes()].concat());
}

/// The rows of `make_gguf_k.py`.
fn rows(rows: usize, cols: usize) -> Vec<Vec<f32>> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut values = Vec::new();
    for row in 0..rows {
        let draws: Vec<[f32; 4]> = (0..cols).map(|_| std::array::from_fn(|_| next())).collect();
        let plain = draws.iter().map(|d| (d[0] + d[1] + d[2] + d[3]) * 0.02);
        values.push(match row {
            12 | 13 => draws.iter().map(|d| d[0]).collect(),
            14 => plain.map(|v| v.abs()).collect(),
            15 => plain.map(|v| -v.abs() - 0.25).collect(),
            16 => plain.enumerate().map(|(i, v)| if i % 100 == 0 { v * 32.0 } else { v }).collect(),
            17 => plain.map(|v| v * 2f32.powi(-6)).collect(),
            18 => plain.map(|v| v * 2f32.powi(10)).collect(),
            19 => vec![0.0; cols],
            20 => plain.enumerate().map(|(i, v)| if i < 512 { 0.0 } else { v }).collect(),
            _ => plain.collect(),
        });
    }
    values
}

#[test]
fn k_types_lose_no_more_than_llama_cpps_quantizer() {
    let file = file("gguf_k.safetensors");
    let tensors = SafeTensors::deserialize(&file).unwrap();
    for format in [Format::Q4K, Format::Q5K, Format::Q6K] {
        let theirs = tensors.tensor(&format!("{format}.errors")).unwrap();
        let theirs: Vec<f64> = theirs.data().as_chunks::<8>().0.iter().map(|&word| f64::from_le_bytes(word)).collect();
        let (mut sum, mut sum_of_theirs) = (0.0, 0.0);
        for (row, (values, theirs)) in rows(theirs.len(), 1024).iter().zip(&theirs).enumerate() {
            let mut decoded = vec![0.0; values.len()];
            format.decode_row(&encoded(format, values).unwrap(), &mut decoded);
            let error: f64 = decoded.iter().zip(values).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
            assert!(error <= 1.02 * theirs, "{format} row {row}: {error:e}, llama.cpp {theirs:e}");
            // By magnitude, so that no row drowns in another.
            let norm = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().max(f64::MIN_POSITIVE);
            sum += error / norm;
            sum_of_theirs += theirs / norm;
        }
        println!("{format}: {:.5} of llama.cpp's error", sum / sum_of_theirs);
    }
}

#[test]
fn what_is_only_read_is_not_written() {
    for format in Format::ALL {
        let values = [0.5; 256];
        let written = encoded(format, &values);
        let is_read_alone = matches!(format, Format::Q2K | Format::Q3K | Format::IQ4NL | Format::IQ4XS | Format::MXFP4);
        assert_eq!(written.is_none(), is_read_alone, "{format}");
        if let Some(bytes) = written {
            let mut decoded = [0.0; 256];
            format.decode_row(&bytes, &mut decoded);
            assert!(decoded.iter().all(|value| (value - 0.5).abs() < 0.01), "{format}: {}", decoded[0]);
        }
    }
}

#[test]
fn extreme_values_are_encoded_without_panic() {
    let tiny = f32::from_bits(1);
    for format in Format::ALL {
        for values in [[tiny; 256], [-tiny; 256], [65504.0; 256], [-65504.0; 256], [1e-30; 256]] {
            let mut mixed = values;
            mixed.iter_mut().step_by(3).for_each(|value| *value = -*value);
            for values in [values, mixed] {
                let Some(bytes) = encoded(format, &values) else { continue };
                let mut decoded = [0.0; 256];
                format.decode_row(&bytes, &mut decoded);
                assert!(decoded.iter().all(|value| value.is_finite()), "{format} {}", values[0]);
            }
        }
    }
}
