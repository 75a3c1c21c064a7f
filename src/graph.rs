//! Ops as nodes of candle's graph, and the choice of a device.
//!
//! An op computes its result once, in a pass on the device of its arguments, and hands it over together
//! with a closure that gives the gradients. That closure keeps what backward needs, so that backward can run
//! again. An op with several results makes a node of each; one with more than three inputs has them carried.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape,
    Storage, Tensor, bail,
};

/// Runs `cpu::$pass(..)` or `cuda::$pass(..)` of the op that calls it, on the device of `$x`. Where there is neither,
/// the op does not come here: it is composed of candle's ops (`composed.rs`).
macro_rules! run_pass {
    ($op:expr, $x:expr, $pass:ident($($arg:expr),* $(,)?)) => {
        match $x.device() {
            candle_core::Device::Cpu => cpu::$pass($($arg),*),
            #[cfg(feature = "cuda")]
            candle_core::Device::Cuda(_) => cuda::$pass($($arg),*),
            device => Err($crate::check::unsupported_device($op, device)),
        }
    };
}
pub(crate) use run_pass;

/// A finished result that no gradient flows through.
pub(crate) fn detached(result: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(result, shape, BackpropOp::none(), false)
}

/// A result of zeros.
pub(crate) fn zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Storage> {
    let zeros = Tensor::zeros(shape.into(), dtype, device)?;
    let (storage, layout) = zeros.storage_and_layout();
    storage.try_clone(layout)
}

/// What the backward pass of a node begins with.
pub(crate) struct Backward<'a, const N: usize> {
    /// The result.
    pub(crate) y: &'a Tensor,
    /// The gradient that arrives, strided or not.
    pub(crate) dy: &'a Tensor,
    /// Which inputs are there and track a gradient.
    tracks: [bool; N],
}

impl<const N: usize> Backward<'_, N> {
    /// The gradient of input `at`, if it is wanted.
    pub(crate) fn of(
        &self,
        at: usize,
        gradient: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Option<Tensor>> {
        self.tracks[at].then(gradient).transpose()
    }

    /// True if a gradient of input `at` is wanted.
    pub(crate) fn wants(&self, at: usize) -> bool {
        self.tracks[at]
    }
}

/// Makes `result`, of shape `shape`, what the op has made of `inputs`.
///
/// `backward` gives the gradient, contiguous, of every input that tracks one, at its place; what it gives for
/// others is dropped.
pub(crate) fn node<const N: usize>(
    op: &'static str,
    inputs: [Option<&Tensor>; N],
    (result, shape): (Storage, impl Into<Shape>),
    backward: impl Fn(Backward<'_, N>) -> Result<[Option<Tensor>; N]> + Send + Sync + 'static,
) -> Result<Tensor> {
    let tracks = inputs.map(|input| input.is_some_and(Tensor::track_op));
    let tracked: Vec<&Tensor> =
        inputs.into_iter().flatten().filter(|input| input.track_op()).collect();
    let backward = move |y: &Tensor, dy: &Tensor| {
        let gradients = backward(Backward { y, dy, tracks })?.into_iter().zip(tracks).enumerate();
        let of_tracked = gradients.filter(|(_, (_, tracks))| *tracks);
        let of_tracked = of_tracked.map(|(at, (gradient, _))| match gradient {
            Some(gradient) => Ok(gradient),
            None => bail!("{op}: backward: expected a gradient of input {at}, got none"),
        });
        of_tracked.collect()
    };
    attach(op, &tracked, (result, shape.into()), backward)
}

/// The node of a result and of the inputs that track a gradient.
fn attach(
    op: &'static str,
    tracked: &[&Tensor],
    (result, shape): (Storage, Shape),
    backward: impl Fn(&Tensor, &Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    if tracked.is_empty() {
        return Ok(detached(result, shape));
    }
    let result = Mutex::new(Some(result));
    let node = |backward: Box<Gradients>| Node { op, result, shape, backward };
    match tracked {
        [] => bail!("{op}: expected inputs, got none"),
        [x] => x.apply_op1(node(Box::new(backward))),
        [x1, x2] => x1.apply_op2(x2, node(Box::new(backward))),
        [x1, x2, x3] => x1.apply_op3(x2, x3, node(Box::new(backward))),
        [x1, x2, rest @ ..] => {
            let (carrier, gradients) = carry(op, rest)?;
            let of_carrier = carrier.zeros_like()?;
            let backward = move |y: &Tensor, dy: &Tensor| {
                let mut of_first = backward(y, dy)?;
                gradients.leave(of_first.split_off(2));
                of_first.push(of_carrier.clone());
                Ok(of_first)
            };
            x1.apply_op3(x2, &carrier, node(Box::new(backward)))
        }
    }
}

/// A tensor that stands for several, since an op of candle takes no more than three. Its one element says
/// nothing: their gradients are handed from node to node beside candle's graph.
fn carry(op: &'static str, tensors: &[&Tensor]) -> Result<(Tensor, Arc<Carried>)> {
    let gradients = Arc::new(Carried::default());
    let result = (zeros((), DType::F32, tensors[0].device())?, Shape::from(()));
    let left = gradients.clone();
    let backward = move |_: &Tensor, _: &Tensor| left.take(op);
    Ok((attach(op, tensors, result, backward)?, gradients))
}

/// Gradients on their way to a [`carry`], of each thread that runs backward. Where it fails in between, they
/// stay until that thread runs it again.
#[derive(Default)]
struct Carried(Mutex<HashMap<ThreadId, Vec<Tensor>>>);

impl Carried {
    fn lock(&self) -> MutexGuard<'_, HashMap<ThreadId, Vec<Tensor>>> {
        // An entry is there or not, so a panic elsewhere leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, gradients: Vec<Tensor>) {
        self.lock().insert(std::thread::current().id(), gradients);
    }

    fn take(&self, op: &str) -> Result<Vec<Tensor>> {
        match self.lock().remove(&std::thread::current().id()) {
            Some(gradients) => Ok(gradients),
            None => bail!("{op}: backward: expected gradients that were left here, got none"),
        }
    }
}

type Gradients = dyn Fn(&Tensor, &Tensor) -> Result<Vec<Tensor>> + Send + Sync;

/// An op of candle whose forward pass hands over a finished result.
struct Node {
    op: &'static str,
    result: Mutex<Option<Storage>>,
    shape: Shape,
    /// The gradients of all inputs, in their order.
    backward: Box<Gradients>,
}

impl Node {
    fn result(&self) -> Result<(Storage, Shape)> {
        // A storage is moved or not, so a panic elsewhere leaves nothing half done.
        match self.result.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(result) => Ok((result, self.shape.clone())),
            None => bail!("{}: expected to be applied once, got applied again", self.op),
        }
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.result()? {
            (Storage::Cpu(result), shape) => Ok((result, shape)),
            _ => bail!("{}: expected inputs on the device of the result, got the CPU", self.op),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.result()? {
            (Storage::Cuda(result), shape) => Ok((result, shape)),
            _ => bail!("{}: expected inputs on the device of the result, got CUDA", self.op),
        }
    }

    fn gradients<const N: usize>(&self, y: &Tensor, dy: &Tensor) -> Result<[Tensor; N]> {
        let gradients = (self.backward)(y, dy)?;
        let count = gradients.len();
        match gradients.try_into() {
            Ok(gradients) => Ok(gradients),
            Err(_) => bail!("{}: backward: expected {N} gradients, got {count}", self.op),
        }
    }
}

impl CustomOp1 for Node {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let [dx] = self.gradients(y, dy)?;
        Ok(Some(dx))
    }
}

impl CustomOp2 for Node {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx1, dx2] = self.gradients(y, dy)?;
        Ok((Some(dx1), Some(dx2)))
    }
}

impl CustomOp3 for Node {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx1, dx2, dx3] = self.gradients(y, dy)?;
        Ok((Some(dx1), Some(dx2), Some(dx3)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// `Σ x_i * (i + 1)` as one op, whose result is computed by candle.
    fn weighted_sum<const N: usize>(inputs: [&Tensor; N]) -> Result<Tensor> {
        let mut sum = inputs[0].zeros_like()?;
        for (i, x) in inputs.iter().enumerate() {
            sum = (sum + (x.detach() * (i + 1) as f64)?)?;
        }
        let (storage, layout) = sum.storage_and_layout();
        let result = (storage.try_clone(layout)?, sum.shape().clone());
        node("weighted_sum", inputs.map(Some), result, |back| {
            let gradient = |i: usize| Ok(Some((back.dy * i as f64)?));
            let gradients: Result<Vec<_>> = (1..=N).map(gradient).collect();
            Ok(gradients?.try_into().expect("one each"))
        })
    }

    #[test]
    fn any_number_of_inputs_gets_gradients_and_again() -> Result<()> {
        let vars = (0..9).map(|i| Var::new(&[i as f32, 1.], &Device::Cpu));
        let vars = vars.collect::<Result<Vec<_>>>()?;
        let x: [&Tensor; 9] = std::array::from_fn(|i| vars[i].as_tensor());
        let y = weighted_sum(x)?;
        assert_eq!(y.to_vec1::<f32>()?, [240., 45.]);
        // Twice in one graph, and then backward once more.
        let loss = (y.sqr()? + weighted_sum(x)?)?;
        for _ in 0..2 {
            let grads = loss.backward()?;
            for (i, var) in vars.iter().enumerate() {
                let expected = [481., 91.].map(|slope| slope * (i + 1) as f32);
                let Some(grad) = grads.get(var) else { bail!("input {i} has no gradient") };
                assert_eq!(grad.to_vec1::<f32>()?, expected, "input {i}");
            }
        }
        Ok(())
    }

    #[test]
    fn backward_runs_in_several_threads_at_once() -> Result<()> {
        let vars = (0..5).map(|i| Var::new(&[i as f32], &Device::Cpu));
        let vars = vars.collect::<Result<Vec<_>>>()?;
        let y = weighted_sum::<5>(std::array::from_fn(|i| vars[i].as_tensor()))?;
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let grads = y.backward().expect("a second backward works");
                        for (i, var) in vars.iter().enumerate() {
                            let grad = grads.get(var).expect("every input has a gradient");
                            assert_eq!(grad.to_vec1::<f32>().unwrap(), [(i + 1) as f32]);
                        }
                    }
                });
            }
        });
        Ok(())
    }

    #[test]
    fn inputs_that_track_nothing_are_no_part_of_the_graph() -> Result<()> {
        let (x, var) = (Tensor::new(&[1f32], &Device::Cpu)?, Var::new(&[2f32], &Device::Cpu)?);
        assert!(!weighted_sum([&x, &x])?.track_op());
        let grads = weighted_sum([&x, &x, var.as_tensor(), &x])?.backward()?;
        assert!(grads.get(&x).is_none());
        assert_eq!(grads.get(&var).map(|grad| grad.to_vec1::<f32>()).transpose()?, Some(vec![3.]));
        Ok(())
    }

    #[test]
    fn a_missing_gradient_is_an_error() -> Result<()> {
        let x = Var::new(&[1f32], &Device::Cpu)?;
        let result = Storage::Cpu(CpuStorage::F32(vec![1.]));
        let y = node("identity", [Some(x.as_tensor())], (result, 1), |_| Ok([None]))?;
        let error = y.backward().err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("identity: backward: expected a gradient of input 0"), "{error}");
        Ok(())
    }
}
