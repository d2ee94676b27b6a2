//! AdamW with both moments in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): dynamic codes, a magnitude for
//! each block of 256, blocks beginning anew with each tensor; tensors of fewer than 4,096 values keep theirs in f32. As bitsandbytes'
//! `AdamW8bit`, but that each value takes the nearest code, zero stays zero and no other second moment becomes zero (the step would be a leap):
//! its CPU form takes codes from a table that is coarse near zero, in which zero and what is near it become 1.6e-5 of the block's magnitude.

use std::ops::Range;

use retune_engine::params::{Param, ParamLayout};
use retune_formats::safetensors::Values;
use retune_kernels::parallel::{self, SharedMut};
use retune_quant::dynamic::{BLOCK, DynamicCodes};

use super::adamw::{Factors, update};
use super::{StateMut, Step};

/// Tensors with fewer values keep their moments in f32.
const LEAST: usize = 4096;
/// Blocks that are worked on at a time.
const BLOCKS: usize = 64;

/// One moment of all parameters: in f32 those of small tensors, one tensor after the other, in 8 bits those of the others.
#[derive(Clone, Debug, PartialEq)]
struct Moment {
    plain: Vec<f32>,
    codes: Vec<u8>,
    magnitudes: Vec<f32>,
}

/// Both moments.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct AdamW8bit {
    first: Moment,
    second: Moment,
}

/// Where a tensor's moments lie.
enum Place {
    Plain(Range<usize>),
    /// The first code, and the first block.
    Coded(usize, usize),
}

/// Places of the tensors one after the other, and how many values, codes and blocks there are of all.
fn places(layout: &ParamLayout) -> (Vec<Place>, [usize; 3]) {
    let [mut plain, mut codes, mut blocks] = [0; 3];
    let place = |param: &Param| {
        let len = param.range.len();
        if len < LEAST {
            plain += len;
            return Place::Plain(plain - len..plain);
        }
        let place = Place::Coded(codes, blocks);
        codes += len;
        blocks += len.div_ceil(BLOCK);
        place
    };
    let places = layout.params().iter().map(place).collect();
    (places, [plain, codes, blocks])
}

/// Bytes of the moments of a tensor.
pub(super) fn state_bytes(param: &Param) -> usize {
    let len = param.range.len();
    2 * if len < LEAST { 4 * len } else { len + 4 * len.div_ceil(BLOCK) }
}

impl AdamW8bit {
    /// Moments of zero.
    pub fn new(layout: &ParamLayout) -> Self {
        let (_, [plain, codes, blocks]) = places(layout);
        // Without a magnitude every code is zero.
        let moment = || Moment { plain: vec![0.0; plain], codes: vec![0; codes], magnitudes: vec![0.0; blocks] };
        Self { first: moment(), second: moment() }
    }

    pub fn step(&mut self, layout: &ParamLayout, step: Step, gradients: &mut [f32], parameters: &mut [f32]) {
        let (signed, unsigned) = (DynamicCodes::new(true), DynamicCodes::new(false));
        let (places, _) = places(layout);
        let Self { first, second } = self;
        let (g, p) = (SharedMut::new(gradients), SharedMut::new(parameters));
        let [first_codes, second_codes] = [&mut first.codes, &mut second.codes].map(|codes| SharedMut::new(codes));
        let [first_magnitudes, second_magnitudes] =
            [&mut first.magnitudes, &mut second.magnitudes].map(|values| SharedMut::new(values));
        for (param, place) in layout.params().iter().zip(places) {
            let factors = Factors::of(step, param);
            let (start, len) = (param.range.start, param.range.len());
            let (code, block) = match place {
                Place::Plain(range) => {
                    // SAFETY: nothing else is at work.
                    let (g, p) = unsafe { (g.slice(start, len), p.slice(start, len)) };
                    update(factors, g, p, &mut first.plain[range.clone()], &mut second.plain[range]);
                    continue;
                }
                Place::Coded(code, block) => (code, block),
            };
            parallel::for_each(len.div_ceil(BLOCK * BLOCKS), |piece| {
                let blocks = piece * BLOCKS..(piece + 1) * BLOCKS;
                for b in blocks.take_while(|b| b * BLOCK < len) {
                    let (at, n) = (b * BLOCK, BLOCK.min(len - b * BLOCK));
                    let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
                    let (m, v) = (&mut m[..n], &mut v[..n]);
                    // SAFETY: blocks are disjoint, and so are their magnitudes.
                    unsafe {
                        let (m_codes, v_codes) = (first_codes.slice(code + at, n), second_codes.slice(code + at, n));
                        let m_magnitude = &mut first_magnitudes.slice(block + b, 1)[0];
                        let v_magnitude = &mut second_magnitudes.slice(block + b, 1)[0];
                        signed.decode(m_codes, *m_magnitude, m);
                        unsigned.decode(v_codes, *v_magnitude, v);
                        update(factors, g.slice(start + at, n), p.slice(start + at, n), m, v);
                        *m_magnitude = signed.encode(m, m_codes);
                        *v_magnitude = unsigned.encode(v, v_codes);
                    }
                }
            });
        }
    }

    pub fn state(&self) -> Vec<(&'static str, Values<'_>)> {
        let Self { first, second } = self;
        vec![
            ("first_moment", Values::F32(&first.plain)),
            ("first_moment.codes", Values::U8(&first.codes)),
            ("first_moment.magnitudes", Values::F32(&first.magnitudes)),
            ("second_moment", Values::F32(&second.plain)),
            ("second_moment.codes", Values::U8(&second.codes)),
            ("second_moment.magnitudes", Values::F32(&second.magnitudes)),
        ]
    }

    pub fn state_mut(&mut self) -> Vec<(&'static str, StateMut<'_>)> {
        let Self { first, second } = self;
        vec![
            ("first_moment", StateMut::F32(&mut first.plain)),
            ("first_moment.codes", StateMut::U8(&mut first.codes)),
            ("first_moment.magnitudes", StateMut::F32(&mut first.magnitudes)),
            ("second_moment", StateMut::F32(&mut second.plain)),
            ("second_moment.codes", StateMut::U8(&mut second.codes)),
            ("second_moment.magnitudes", StateMut::F32(&mut second.magnitudes)),
        ]
    }
}
