//! The bytes that an op has to move, in elements of its dtype for each element of x: every input read
//! once, every output written once, no mask.
//!
//! | op | forward | backward |
//! |---|---|---|
//! | `dropout` | x, y: 2 | dy, dx: 2 |
//! | `dropout_add` | x, residual, y: 3 | dy, dx: 2 (dresidual is dy) |
//! | `dropout_add` with bias | 3, the bias counts nothing | 2, and dy once more for dbias: 3 |
//! | `dropout_add_norm` | x, residual, z, n: 4 | dn, z, dresidual, dx: 4 |
//! | `activation_dropout` (GELU) | x, y: 2 | x, dy, dx: 3 |
//! | `softmax_dropout` | scores, y: 2 | scores, dy, dscores: 3 |
//! | `rope` | x, y: 2, the tables count nothing | dy, dx: 2 |
//! | `cross_entropy` | logits: 1 | logits, dlogits: 2 |
//! | `drop_path_add` | residual, y, and x where kept: 2 + kept | dx, and dy where kept: 1 + kept |

use crate::runner::Op;

/// Forward and backward, for a mask of which the part `kept` is kept.
pub fn per_element(op: Op, kept: f64) -> (f64, f64) {
    match op {
        Op::Dropout => (2., 2.),
        Op::DropoutAdd => (3., 2.),
        Op::DropoutAddBias => (3., 3.),
        Op::DropoutAddNorm => (4., 4.),
        Op::GeluTanhDropout | Op::Softmax => (2., 3.),
        Op::Rope => (2., 2.),
        Op::CrossEntropy => (1., 2.),
        Op::DropPathAddRow => (2. + kept, 1. + kept),
        // The bench has no other.
        _ => (f64::NAN, f64::NAN),
    }
}
