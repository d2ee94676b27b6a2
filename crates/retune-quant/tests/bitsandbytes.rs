//! Decoding of 4-bit storage against bitsandbytes, bit for bit (`goldens/make_bitsandbytes.py` makes the file).

use retune_kernels::PanelSource;
use retune_quant::dynamic::dynamic_map;
use retune_quant::encode::{self, NestedAbsmax};
use retune_quant::{Absmax, FourBit, Matrix, QuantType, SharedBytes, encode_row};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/bitsandbytes.safetensors");
const ENCODINGS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/bitsandbytes_encoding.safetensors");

/// A matrix that bitsandbytes has quantized, and the values it must have.
struct Golden {
    case: String,
    matrix: Matrix,
    values: Vec<f32>,
}

fn f32s(tensor: &TensorView) -> Vec<f32> {
    let (words, rest) = tensor.data().as_chunks::<4>();
    assert!(rest.is_empty());
    words.iter().map(|&word| f32::from_le_bytes(word)).collect()
}

fn sizes(tensor: &TensorView) -> [usize; 4] {
    let sizes: Vec<usize> =
        tensor.data().as_chunks::<8>().0.iter().map(|&size| u64::from_le_bytes(size) as usize).collect();
    sizes.try_into().unwrap()
}

fn goldens() -> Vec<Golden> {
    let file = std::fs::read(GOLDENS).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let names = tensors.names();
    let cases = names.iter().filter_map(|name| name.strip_suffix(".values"));
    cases
        .map(|case| {
            let part = |name: &str| tensors.tensor(&format!("{case}.{name}")).unwrap();
            let [rows, cols, blocksize, nested_blocksize] = sizes(&part("sizes"));
            let absmax = if nested_blocksize == 0 {
                f32s(&part("absmax")).into()
            } else {
                let map: [f32; 256] = f32s(&part("nested_quant_map")).try_into().unwrap();
                let scales = f32s(&part("nested_absmax"));
                let offset = f32s(&part("nested_offset"))[0];
                let indices = SharedBytes::from_vec(part("absmax").data().to_vec());
                Absmax::nested(indices, map, scales, nested_blocksize, offset).unwrap()
            };
            let quant_type = QuantType::from_name(case.split('_').next().unwrap()).unwrap();
            let code: [f32; 16] = f32s(&part("quant_map")).try_into().unwrap();
            let indices = SharedBytes::from_vec(part("weight").data().to_vec());
            let stored = FourBit::new(quant_type, blocksize, code, absmax, indices).unwrap();
            let matrix = Matrix::from_four_bit(rows, cols, stored).unwrap();
            Golden { case: case.to_owned(), matrix, values: f32s(&part("values")) }
        })
        .collect()
}

#[test]
fn every_value_is_that_of_bitsandbytes() {
    let goldens = goldens();
    assert_eq!(goldens.len(), 7);
    for Golden { case, matrix, values } in goldens {
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&matrix.to_f32()), bits(&values), "{case}");
    }
}

#[test]
fn any_panel_is_that_part_of_the_whole() {
    let mut state = 1u64;
    let mut below = |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    for Golden { case, matrix, values } in goldens() {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        for _ in 0..300 {
            let (r, c) = (below(rows), below(cols));
            let (r, c) = (r..r + 1 + below(rows - r), c..c + 1 + below(cols - c));
            let mut panel = vec![f32::NAN; r.len() * c.len()];
            matrix.panel_f32(r.clone(), c.clone(), &mut panel);
            let expected = r.clone().flat_map(|row| values[row * cols..][c.clone()].iter().copied());
            assert!(panel.iter().copied().eq(expected), "{case} rows {r:?} columns {c:?}");
        }
    }
}

/// The values of a tensor in f32 or bf16.
fn floats(tensor: &TensorView) -> Vec<f32> {
    match tensor.dtype() {
        Dtype::BF16 => {
            let halves = tensor.data().as_chunks::<2>().0.iter();
            halves.map(|half| f32::from_bits(u32::from(u16::from_le_bytes(*half)) << 16)).collect()
        }
        _ => f32s(tensor),
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn what_is_encoded_is_what_bitsandbytes_encodes() {
    let file = std::fs::read(ENCODINGS).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let names = tensors.names();
    let cases: Vec<&str> = names.iter().filter_map(|name| name.strip_suffix(".values")).collect();
    assert_eq!(cases.len(), 14);
    let mut eights = 0;
    for case in cases {
        let part = |name: &str| tensors.tensor(&format!("{case}.{name}")).unwrap();
        let values = floats(&part("values"));
        let mut absmax = vec![f32::NAN; values.len().div_ceil(encode::BLOCKSIZE)];
        for (quant_type, key) in [(QuantType::NF4, "nf4"), (QuantType::FP4, "fp4")] {
            let mut indices = vec![0; values.len().div_ceil(2)];
            encode::four_bit(quant_type, &values, &mut indices, &mut absmax);
            assert_eq!(indices, part(&format!("{key}.weight")).data(), "{case}, {key}: codes");
            assert_eq!(bits(&absmax), bits(&f32s(&part(&format!("{key}.absmax")))), "{case}, {key}: absmax");
        }
        if let Ok(codes) = tensors.tensor(&format!("{case}.int8.weight")) {
            let mut bytes = vec![0; values.len()];
            let rows = values.chunks(codes.shape()[1]).zip(bytes.chunks_mut(codes.shape()[1]));
            let absmax: Vec<f32> = rows.map(|(row, bytes)| encode_row(row, bytes)).collect();
            let differ = bytes.iter().zip(codes.data()).filter(|(ours, theirs)| ours != theirs).count();
            assert_eq!(differ, 0, "{case}: codes of 8 bits");
            assert_eq!(bits(&absmax), bits(&f32s(&part("int8.SCB"))), "{case}: SCB");
            eights += 1;
        }
        let offset = f32s(&part("nested.offset"))[0];
        let nested = NestedAbsmax::around(offset, &absmax);
        assert_eq!(nested.indices, part("nested.absmax").data(), "{case}: nested codes");
        assert_eq!(bits(&nested.scales), bits(&f32s(&part("nested.nested_absmax"))), "{case}: nested absmax");
        let ours = NestedAbsmax::of(&absmax).offset;
        let away = ours.to_bits().abs_diff(offset.to_bits());
        assert!(away <= 2, "{case}: offset {ours}, bitsandbytes has {offset}");
    }
    assert_eq!(eights, 12);
}

#[test]
fn codes_of_magnitudes_are_those_of_bitsandbytes_and_not_always_the_nearest() {
    let file = std::fs::read(ENCODINGS).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let part = |name: &str| tensors.tensor(&format!("magnitudes.{name}")).unwrap();
    let (absmax, offset) = (f32s(&part("absmax")), f32s(&part("offset"))[0]);
    let nested = NestedAbsmax::around(offset, &absmax);
    let differ = nested.indices.iter().zip(part("codes").data()).filter(|(ours, theirs)| ours != theirs).count();
    assert_eq!((differ, absmax.len()), (0, 4100));
    assert_eq!(bits(&nested.scales), bits(&f32s(&part("scales"))));
    assert!(NestedAbsmax::of(&absmax).offset.to_bits().abs_diff(offset.to_bits()) <= 2);
}

#[test]
fn the_tables_are_those_of_bitsandbytes() {
    let file = std::fs::read(GOLDENS).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let table = |name: &str| f32s(&tensors.tensor(name).unwrap());
    assert_eq!(bits(&dynamic_map(true)), bits(&table("nf4_nested.nested_quant_map")));
    for (quant_type, name) in [(QuantType::NF4, "nf4.quant_map"), (QuantType::FP4, "fp4.quant_map")] {
        assert_eq!(bits(&quant_type.code()), bits(&table(name)), "{name}");
    }
}

#[test]
fn pieces_of_whole_blocks_are_encoded_like_the_whole() {
    let values: Vec<f32> = (0..1000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8e6 - 1.0).collect();
    let encoded = |values: &[f32]| {
        let (mut indices, mut absmax) = (vec![0; values.len().div_ceil(2)], vec![0.0; values.len().div_ceil(64)]);
        encode::four_bit(QuantType::NF4, values, &mut indices, &mut absmax);
        (indices, absmax)
    };
    let (whole, first, last) = (encoded(&values), encoded(&values[..576]), encoded(&values[576..]));
    assert_eq!(whole, ([first.0, last.0].concat(), [first.1, last.1].concat()));
}
