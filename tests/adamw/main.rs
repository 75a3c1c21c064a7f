//! AdamW: against candle's, in halves, clipped, scaled, saved; what is refused; what a model makes of it.

mod against_candle;
mod halves;
mod model;
mod refused;
mod scaled;
mod state;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::training::ParamsAdamW;
use cases::{bits, random};

fn vars(shapes: &[Vec<usize>], dtype: DType, seed: u64) -> Result<Vec<Var>> {
    let var = |(at, dims): (usize, &Vec<usize>)| {
        Var::from_tensor(&random(dims, dtype, seed + at as u64)?)
    };
    shapes.iter().enumerate().map(var).collect()
}

/// Copies of variables, to be trained by another optimiser.
fn copies(vars: &[Var]) -> Result<Vec<Var>> {
    vars.iter().map(|var| Var::from_tensor(&var.as_detached_tensor())).collect()
}

/// A gradient at random for each variable.
fn gradients(vars: &[Var], seed: u64) -> Result<Vec<Tensor>> {
    let grad = |(at, var): (usize, &Var)| random(var.dims(), var.dtype(), 1000 * seed + at as u64);
    vars.iter().enumerate().map(grad).collect()
}

fn store(vars: &[Var], grads: &[Tensor]) -> GradStore {
    let mut store = GradStore::default();
    for (var, grad) in vars.iter().zip(grads) {
        store.insert(var, grad.clone());
    }
    store
}

/// The bits of all variables, where a zero has no sign.
fn all_bits(vars: &[Var]) -> Result<Vec<Vec<u64>>> {
    vars.iter().map(|var| bits(&(var.as_tensor() + 0.)?)).collect()
}

/// Every bit of all variables.
fn exact_bits(vars: &[Var]) -> Result<Vec<Vec<u8>>> {
    vars.iter().map(|var| bytes(var)).collect()
}

/// The bytes of a tensor, whatever its dtype.
fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    tensor.write_bytes(&mut bytes)?;
    Ok(bytes)
}

fn params(lr: f64) -> ParamsAdamW {
    ParamsAdamW { lr, ..Default::default() }
}

fn tensor(values: &[f32]) -> Result<Tensor> {
    Tensor::new(values, &Device::Cpu)
}
