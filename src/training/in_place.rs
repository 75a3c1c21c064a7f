//! Tensors as a pass writes them: in place.

use std::cell::RefCell;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result, Tensor, bail};

use crate::cpu::Element;

/// The storage of a tensor, locked for writing, and where its elements lie in it.
pub(super) struct Written<'a> {
    op: &'static str,
    storage: Storage<'a>,
    offsets: (usize, usize),
}

enum Storage<'a> {
    Cpu(&'a mut CpuStorage),
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    Cuda(&'a mut CudaStorage),
}

impl<'a> Written<'a> {
    /// The elements of a tensor on the CPU.
    pub(super) fn elements<E: Element>(self) -> Result<&'a mut [E]> {
        let (start, end) = self.offsets;
        match self.storage {
            Storage::Cpu(storage) => {
                let dtype = storage.dtype();
                match E::elements_mut(storage) {
                    Some(elements) => Ok(&mut elements[start..end]),
                    None => bail!(
                        "{}: tensor to write: expected {:?}, got {dtype:?}; make the variable anew, of \
                         what to_dtype gives",
                        self.op,
                        E::DTYPE
                    ),
                }
            }
            Storage::Cuda(_) => {
                bail!("{}: expected a tensor on the CPU; move it with to_device", self.op)
            }
        }
    }

    /// The storage of a tensor on CUDA, and where its elements lie.
    #[cfg(feature = "cuda")]
    pub(super) fn cuda(self) -> Result<(&'a mut CudaStorage, (usize, usize))> {
        match self.storage {
            Storage::Cuda(storage) => Ok((storage, self.offsets)),
            Storage::Cpu(_) => {
                bail!("{}: expected a tensor on CUDA; move it with to_device", self.op)
            }
        }
    }
}

/// Calls `f` with the storage of a contiguous tensor, which nobody else reads or writes meanwhile.
///
/// This is the one way that candle has to write a tensor in place without a copy.
pub(super) fn write<R>(
    op: &'static str,
    tensor: &Tensor,
    f: impl FnOnce(Written<'_>) -> Result<R>,
) -> Result<R> {
    let writer = Writer { op, f: RefCell::new(Some(f)), result: RefCell::new(None) };
    tensor.inplace_op1(&writer)?;
    match writer.result.into_inner() {
        Some(result) => Ok(result),
        None => bail!("{op}: expected the CPU or CUDA; move the tensor with to_device"),
    }
}

/// An op of candle that hands a storage to a closure, once.
struct Writer<F, R> {
    op: &'static str,
    f: RefCell<Option<F>>,
    result: RefCell<Option<R>>,
}

impl<R, F: FnOnce(Written<'_>) -> Result<R>> Writer<F, R> {
    fn run(&self, storage: Storage<'_>, layout: &Layout) -> Result<()> {
        let op = self.op;
        let Some(offsets) = layout.contiguous_offsets() else {
            bail!(
                "{op}: tensor to write: expected a contiguous one, got {layout:?}; make the variable of a copy"
            )
        };
        if let Some(f) = self.f.borrow_mut().take() {
            let result = f(Written { op, storage, offsets })?;
            self.result.replace(Some(result));
        }
        Ok(())
    }
}

impl<R, F: FnOnce(Written<'_>) -> Result<R>> InplaceOp1 for Writer<F, R> {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        self.run(Storage::Cpu(storage), layout)
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.run(Storage::Cuda(storage), layout)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn a_tensor_is_written_where_it_lies() -> Result<()> {
        let var = Var::new(&[1f32, 2., 3.], &Device::Cpu)?;
        let address = |var: &Var| {
            write("test", var, |written| Ok(written.elements::<f32>()?.as_ptr().addr()))
        };
        let before = address(&var)?;
        write("test", &var, |written| {
            written.elements::<f32>()?[1] = 7.;
            Ok(())
        })?;
        assert_eq!(address(&var)?, before);
        assert_eq!(var.to_vec1::<f32>()?, [1., 7., 3.]);
        Ok(())
    }

    #[test]
    fn only_the_dtype_of_a_tensor_is_written() -> Result<()> {
        let var = Var::new(&[1f32], &Device::Cpu)?;
        let error = write("test", &var, |written| written.elements::<f64>().map(drop));
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with("test: tensor to write: expected F64, got F32; "), "{error}");
        Ok(())
    }

    #[test]
    fn only_contiguous_tensors_are_written() -> Result<()> {
        let matrix = Var::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
        let error = write("test", &matrix.t()?, |_| Ok(())).unwrap_err().to_string();
        assert!(
            error.starts_with("test: tensor to write: expected a contiguous one, got "),
            "{error}"
        );
        Ok(())
    }
}
