//! Decoding of 4-bit storage against bitsandbytes, bit for bit (`goldens/make_bitsandbytes.py` makes the file).

use retune_kernels::PanelSource;
use retune_quant::{FourBit, Matrix, QuantType, SharedBytes, nested_absmax};
use safetensors::{SafeTensors, tensor::TensorView};

const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/bitsandbytes.safetensors");

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
                f32s(&part("absmax"))
            } else {
                let map: [f32; 256] = f32s(&part("nested_quant_map")).try_into().unwrap();
                let scales = f32s(&part("nested_absmax"));
                let offset = f32s(&part("nested_offset"))[0];
                nested_absmax(part("absmax").data(), &map, &scales, nested_blocksize, offset).unwrap()
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
