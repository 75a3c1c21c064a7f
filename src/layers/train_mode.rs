use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{Module, ModuleT, Result, Tensor};

/// Whether a model trains: a switch that its layers share, for models whose `forward` takes no `train`.
///
/// It begins in training, and evaluates while at least one [`EvalGuard`] lives, in whichever thread: a guard
/// takes itself back when it is dropped, by an early return, an error or a panic as well. A layer bound to the
/// switch ([`Dropout::switched`](crate::Dropout::switched)) draws no key meanwhile.
///
/// All layers of one switch evaluate together. Two threads that train and evaluate at the same time need two
/// switches, and so two models over the same variables.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_dropout::{Dropout, TrainMode};
///
/// # fn main() -> candle_core::Result<()> {
/// let mode = TrainMode::new();
/// let layer = Dropout::new(0.5).switched(&mode);
/// let xs = Tensor::ones(1000, DType::F32, &Device::Cpu)?;
/// {
///     let _guard = mode.eval();
///     assert_eq!(layer.forward(&xs)?.to_vec1::<f32>()?, [1.; 1000]);
/// }
/// assert_ne!(layer.forward(&xs)?.to_vec1::<f32>()?, [1.; 1000]);
/// let ys = mode.evaluate(|| layer.forward(&xs))?;
/// assert_eq!(ys.to_vec1::<f32>()?, [1.; 1000]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct TrainMode {
    /// How many guards live.
    guards: Arc<AtomicUsize>,
}

impl TrainMode {
    /// A switch of its own, in training. A clone is the same switch.
    pub fn new() -> Self {
        Self::default()
    }

    /// False while a guard lives.
    pub fn is_training(&self) -> bool {
        self.guards.load(Ordering::SeqCst) == 0
    }

    /// Evaluates until the guard is dropped.
    pub fn eval(&self) -> EvalGuard {
        self.guards.fetch_add(1, Ordering::SeqCst);
        EvalGuard(self.clone())
    }

    /// Evaluates while `f` runs, and gives what it returns.
    pub fn evaluate<T>(&self, f: impl FnOnce() -> T) -> T {
        let _guard = self.eval();
        f()
    }
}

/// Keeps a [`TrainMode`] in evaluation as long as it lives.
#[derive(Debug)]
#[must_use = "the model trains again as soon as the guard is dropped: `let _guard = mode.eval();`"]
pub struct EvalGuard(TrainMode);

impl Drop for EvalGuard {
    fn drop(&mut self) {
        self.0.guards.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A layer bound to a [`TrainMode`], which makes a `Module` of it.
///
/// A type of its own, because candle gives every `Module` a `forward_t` that ignores `train`: a layer that takes
/// `train` is never a `Module` itself.
#[derive(Clone, Debug)]
pub struct Switched<L> {
    layer: L,
    mode: TrainMode,
}

impl<L> Switched<L> {
    /// Binds any layer, of this crate or not.
    pub fn new(layer: L, mode: &TrainMode) -> Self {
        Self { layer, mode: mode.clone() }
    }

    /// The layer itself.
    pub fn layer(&self) -> &L {
        &self.layer
    }

    /// The layer itself, to change its rate.
    pub fn layer_mut(&mut self) -> &mut L {
        &mut self.layer
    }

    /// The switch.
    pub fn mode(&self) -> &TrainMode {
        &self.mode
    }
}

impl<L: ModuleT> Module for Switched<L> {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.layer.forward_t(xs, self.mode.is_training())
    }
}
