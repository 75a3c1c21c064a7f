use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::{DType, Result, Tensor, bail};

use crate::composed::composes;
use crate::graph::{node, zeros};

/// The parts of `x` along its first dimension, of which there is at least one.
///
/// Candle's `narrow` hands back a tensor as large as `x` for each part: T² steps of memory for a sequence of T. Here
/// a part leaves its gradient beside candle's graph, with a tensor of one element to say so, and they are stacked once.
pub(super) fn unstack(op: &'static str, x: &Tensor) -> Result<Vec<Tensor>> {
    let x = x.contiguous()?;
    if !x.track_op() || composes(x.device()) {
        return (0..x.dim(0)?).map(|at| x.narrow(0, at, 1)?.squeeze(0)).collect();
    }
    let left = Arc::new(Left(Mutex::default()));
    let (taken, like) = (left.clone(), x.detach());
    let carrier = zeros((), DType::F32, x.device())?;
    let carrier = node(op, [Some(&x)], (carrier, ()), move |_| Ok([Some(taken.take(op, &like)?)]))?;
    let of_carrier = carrier.zeros_like()?;
    let part = |at: usize| {
        let part = x.detach().narrow(0, at, 1)?.squeeze(0)?.force_contiguous()?;
        let (storage, layout) = part.storage_and_layout();
        let result = (storage.try_clone(layout)?, part.shape());
        let (left, of_carrier) = (left.clone(), of_carrier.clone());
        node(op, [Some(&carrier)], result, move |back| {
            left.leave(at, back.dy.clone());
            Ok([Some(of_carrier.clone())])
        })
    };
    (0..x.dim(0)?).map(part).collect()
}

/// Gradients of parts on their way, of each thread that runs backward. Where it fails in between, they stay until that
/// thread runs it again.
struct Left(Mutex<HashMap<ThreadId, HashMap<usize, Tensor>>>);

impl Left {
    fn leave(&self, at: usize, gradient: Tensor) {
        // An entry is there or not, so a panic elsewhere leaves nothing half done.
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        left.entry(thread::current().id()).or_default().insert(at, gradient);
    }

    /// The gradient of `like`; of parts that no result was made of it is 0.
    fn take(&self, op: &str, like: &Tensor) -> Result<Tensor> {
        let left =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&thread::current().id());
        let Some(mut left) = left else {
            bail!("{op}: backward: expected gradients that were left here, got none")
        };
        let zeros = like.narrow(0, 0, 1)?.squeeze(0)?.zeros_like()?;
        let parts = (0..like.dim(0)?).map(|at| left.remove(&at).unwrap_or_else(|| zeros.clone()));
        Tensor::stack(&parts.collect::<Vec<_>>(), 0)
    }
}
