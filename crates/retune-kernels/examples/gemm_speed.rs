//! Prints GFLOP/s of the f32 product on the shapes of a small model's training step.
use retune_kernels::F32Panel;
use retune_kernels::gemm::{MatRef, Out, Rhs, Term, gemm};
use std::time::Instant;

fn main() {
    let threads = std::env::args().nth(1).and_then(|t| t.parse().ok()).unwrap_or(2);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        for (t, k, n) in [
            (1024, 576, 576),
            (1024, 576, 192),
            (1024, 576, 1536),
            (1024, 1536, 576),
            (336, 576, 49152),
            (1024, 2048, 2048),
            (1024, 576, 16),
            (1024, 16, 576),
        ] {
            let x = vec![0.5f32; t * k];
            let g = vec![0.5f32; t * n];
            let w = vec![0.25f32; n * k];
            let mut y = vec![0.0f32; t * n];
            let mut dx = vec![0.0f32; t * k];
            let mut dw = vec![0.0f32; n * k];
            let weight = F32Panel::new(&w, k);
            let flops = 2.0 * (t * k * n) as f64;
            let mut line = format!("{t:5} {k:5} {n:6}:");
            for kind in 0..3 {
                let mut best = f64::MAX;
                for _ in 0..8 {
                    let start = Instant::now();
                    let _ = match kind {
                        0 => gemm(
                            t,
                            n,
                            &[Term::new(k, MatRef::rows(&x, k), Rhs::Transposed(&weight))],
                            Out::set(&mut y, n),
                        ),
                        1 => {
                            gemm(t, k, &[Term::new(n, MatRef::rows(&g, n), Rhs::Plain(&weight))], Out::set(&mut dx, k))
                        }
                        _ => gemm(
                            n,
                            k,
                            &[Term::new(t, MatRef::rows(&g, n).t(), Rhs::View(MatRef::rows(&x, k)))],
                            Out::add(&mut dw, k),
                        ),
                    };
                    best = best.min(start.elapsed().as_secs_f64());
                }
                line += &format!(" {:6.1}", flops / best / 1e9);
            }
            println!("{line}");
        }
    });
}
