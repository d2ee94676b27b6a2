//! Prints GOP/s of the product in 8 bits, quantizing included: forward, input gradient, and quantizing alone in ns an element.
use retune_kernels::F32Panel;
use retune_kernels::gemm::{Out, Term, gemm};
use retune_kernels::int8::{Int8Matrix, Int8Rows};
use std::time::Instant;

fn main() {
    let threads = std::env::args().nth(1).and_then(|t| t.parse().ok()).unwrap_or(2);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        for (t, k, n) in [
            (1024, 576, 576),
            (1024, 576, 192),
            (1024, 576, 1536),
            (2048, 576, 1536),
            (1024, 1536, 576),
            (128, 576, 49152),
            (512, 576, 49152),
            (2048, 2048, 2048),
            (2048, 4096, 4096),
        ] {
            let x: Vec<f32> = (0..t * k).map(|i| (i % 97) as f32 - 48.0).collect();
            let g: Vec<f32> = (0..t * n).map(|i| (i % 89) as f32 - 44.0).collect();
            let w: Vec<f32> = (0..n * k).map(|i| (i % 83) as f32 - 41.0).collect();
            let weight = Int8Matrix::new(&F32Panel::new(&w, k), None);
            let (mut y, mut dx) = (vec![0.0f32; t * n], vec![0.0f32; t * k]);
            let (mut xq, mut gq) = (Int8Rows::default(), Int8Rows::default());
            let ops = 2.0 * (t * k * n) as f64;
            let mut line = format!("{t:5} {k:5} {n:6}:");
            for kind in 0..4 {
                let mut best = f64::MAX;
                for _ in 0..8 {
                    let start = Instant::now();
                    match kind {
                        0 => {
                            xq.quantize(&x, k, None);
                            gemm(t, n, &[Term::int8(&xq, &weight)], Out::set(&mut y, n));
                        }
                        1 => {
                            gq.quantize(&g, n, Some(weight.gradient_factors()));
                            gemm(t, k, &[Term::int8_plain(&gq, &weight)], Out::set(&mut dx, k));
                        }
                        2 => xq.quantize(&x, k, None),
                        _ => gq.quantize(&g, n, Some(weight.gradient_factors())),
                    };
                    best = best.min(start.elapsed().as_secs_f64());
                }
                line += &match kind {
                    0 | 1 => format!(" {:7.1}", ops / best / 1e9),
                    2 => format!(" {:6.3}", best * 1e9 / (t * k) as f64),
                    _ => format!(" {:6.3}", best * 1e9 / (t * n) as f64),
                };
            }
            println!("{line}");
        }
    });
}
