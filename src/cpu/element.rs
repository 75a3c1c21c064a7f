//! The dtypes of tensors on the CPU. Twin of `kernels/elem.cuh`.

use candle_core::{CpuStorage, Result, Storage, WithDType};
use half::{bf16, f16};

use super::half::{round_to_bf16, round_to_f16, widen_bf16, widen_f16};
use super::real::Real;
use crate::input::Input;

/// A floating-point dtype of tensors: widened on load, rounded on store.
pub(crate) trait Element: WithDType {
    /// What products, sums and statistics are computed in: f64 for f64, else f32.
    type Real: Real;
    const ZERO: Self;
    fn load(self) -> Self::Real;
    fn store(x: Self::Real) -> Self;
    /// The elements of a storage that is written in place, if they are of this type.
    fn elements_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

macro_rules! element {
    ($elem:ty, $dtype:ident, $real:ty, $zero:expr, $load:expr, $store:expr) => {
        impl Element for $elem {
            type Real = $real;
            const ZERO: Self = $zero;
            #[inline(always)]
            fn load(self) -> $real {
                $load(self)
            }
            #[inline(always)]
            fn store(x: $real) -> Self {
                $store(x)
            }
            fn elements_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                match storage {
                    CpuStorage::$dtype(elements) => Some(elements),
                    _ => None,
                }
            }
        }
    };
}

element!(f32, F32, f32, 0., |x| x, |x| x);
element!(f64, F64, f64, 0., |x| x, |x| x);
element!(f16, F16, f32, f16::ZERO, widen_f16, round_to_f16);
element!(bf16, BF16, f32, bf16::ZERO, widen_bf16, round_to_bf16);

/// Runs `$body` with `$E` bound to the element type of an [`Input`].
macro_rules! for_float_dtype {
    ($x:expr, |$E:ident| $body:expr) => {
        match $x.dtype() {
            candle_core::DType::F32 => {
                type $E = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $E = f64;
                $body
            }
            candle_core::DType::F16 => {
                type $E = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $E = half::bf16;
                $body
            }
            dtype => Err($crate::check::unsupported_dtype($x.op(), "x", dtype)),
        }
    };
}
pub(crate) use for_float_dtype;

impl Input<'_> {
    /// The elements of a contiguous tensor.
    pub(crate) fn slice<E: WithDType>(&self) -> Result<&[E]> {
        let (start, end) = self.contiguous_offsets()?;
        Ok(&E::cpu_storage_as_slice(self.cpu()?)?[start..end])
    }

    /// The elements from the first one of the tensor on, whatever its strides.
    pub(crate) fn strided_slice<E: WithDType>(&self) -> Result<&[E]> {
        Ok(&E::cpu_storage_as_slice(self.cpu()?)?[self.start()..])
    }

    /// The elements of a contiguous tensor whose dtype is one that is computed in.
    pub(crate) fn reals<R: Real>(&self) -> Result<&[R]> {
        let (start, end) = self.contiguous_offsets()?;
        Ok(&R::elements(self.cpu()?)?[start..end])
    }
}

/// The slice of a tensor that may be absent.
pub(crate) fn optional_slice<'a, E: WithDType>(
    x: &'a Option<Input<'_>>,
) -> Result<Option<&'a [E]>> {
    x.as_ref().map(Input::slice).transpose()
}

/// A vector of elements as the storage of a tensor.
pub(crate) fn storage<E: Element>(elements: Vec<E>) -> Storage {
    Storage::Cpu(E::to_cpu_storage_owned(elements))
}
