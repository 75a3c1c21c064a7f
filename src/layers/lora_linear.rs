use std::sync::Arc;

use candle_core::{Module, Result, Tensor, bail};
use candle_nn::init::ZERO;
use candle_nn::{Init, VarBuilder};

use super::linear::Linear;
use super::site::{Site, module_methods, rate_methods};
use crate::check::check_device;
use crate::composed::{times, wide};
use crate::functional::{dropout_linear, linear_out_in};
use crate::mask::{DropMask, MaskGenerator};

const NAME: &str = "lora_linear";

/// Sizes and settings of a [`LoraLinear`], under the names of PEFT's `LoraConfig`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// The rank of what is added to the weight.
    pub r: usize,
    /// What is added is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Drop probability of what goes into the adapter.
    pub lora_dropout: f64,
    /// Whether what is added is scaled by `lora_alpha / sqrt(r)` instead (Kalajdzievski 2023, arXiv 2312.03732).
    pub use_rslora: bool,
}

impl Default for LoraConfig {
    /// PEFT's: rank 8, a scale of 1, no dropout.
    fn default() -> Self {
        Self { r: 8, lora_alpha: 8., lora_dropout: 0., use_rslora: false }
    }
}

/// A linear layer that is frozen, beside an adapter of low rank that learns.
///
/// ```text
/// y = x Wᵀ + b + scaling (dropout(x) Aᵀ) Bᵀ          scaling = lora_alpha / r
/// ```
///
/// `W` and `b` get no gradient, and none is computed. The dropout is on the adapter's input alone; in training it draws
/// one key a call, whatever the rate, in evaluation none. Neither its mask nor what it leaves of `x` is kept for
/// backward ([`dropout_linear`]): at any rate the layer holds what it holds without.
///
/// # Shapes
/// `[.., in]` to `[.., out]`. Parameters as PEFT names them: `lora_A.weight [r, in]` and `lora_B.weight [out, r]`. If
/// they do not exist they are drawn as PEFT draws them, `A` uniformly between `-1/sqrt(in)` and `1/sqrt(in)`
/// (Kaiming with `a = sqrt(5)`) and `B` of zeros: at first the layer gives what the frozen one gives.
///
/// # Dtypes
/// Those of [`dropout_linear`]. The adapter may have another than the frozen layer, say f32 beside bf16: it then
/// computes in its own, and its result is rounded to that of `x`.
///
/// Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: low-rank adaptation of large language models", 2021, arXiv
/// 2106.09685 (eq. 3).
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{LoraConfig, LoraLinear, MaskGenerator, seeded_var_builder};
/// use candle_nn::VarMap;
///
/// # fn main() -> candle_core::Result<()> {
/// let frozen = candle_nn::Linear::new(Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?, None);
/// let vars = VarMap::new();
/// let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
/// let config = LoraConfig { r: 1, lora_dropout: 0.1, ..Default::default() };
/// let layer = LoraLinear::new(frozen, &config, Arc::new(MaskGenerator::new(42)), vb)?;
/// let x = Tensor::new(&[[1f32, 10.]], &Device::Cpu)?;
/// assert_eq!(layer.forward(&x, true)?.to_vec2::<f32>()?, [[21., 43.]]);
/// assert_eq!(vars.all_vars().len(), 2); // what an optimiser moves
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct LoraLinear {
    site: Site,
    base: Linear,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: f64,
    /// The frozen layer with the adapter in its weight.
    merged: Option<Linear>,
}

impl LoraLinear {
    /// An adapter with the variables `lora_A.weight` and `lora_B.weight` of `vb` beside a layer, candle's or that of
    /// [`nn`](crate::nn), which is frozen here: its variables stay as they are, whoever else uses them.
    ///
    /// # Errors
    /// `r` is 0, `lora_alpha` is no finite number, or `lora_dropout` is no probability; the layer's weight is no
    /// matrix; `vb` holds a variable of another shape.
    pub fn new(
        base: impl Into<Linear>,
        config: &LoraConfig,
        generator: Arc<MaskGenerator>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let base: Linear = base.into();
        let LoraConfig { r, lora_alpha, lora_dropout, use_rslora } = *config;
        if r == 0 {
            bail!("{NAME}: r: expected a rank of at least 1, got 0; leave the adapter out instead")
        }
        if !lora_alpha.is_finite() {
            bail!("{NAME}: lora_alpha: expected a finite number, got {lora_alpha}; PEFT's is 8")
        }
        let site = Site::new(lora_dropout, generator).checked(NAME)?;
        let &[out_dim, in_dim] = base.weight().dims() else {
            bail!(
                "{NAME}: base: expected a weight [out, in], got {:?}; reshape it",
                base.weight().dims()
            )
        };
        let bound = 1. / (in_dim as f64).sqrt();
        let init = Init::Uniform { lo: -bound, up: bound };
        let lora_a = vb.pp("lora_A").get_with_hints((r, in_dim), "weight", init)?;
        let lora_b = vb.pp("lora_B").get_with_hints((out_dim, r), "weight", ZERO)?;
        let scaling = lora_alpha / if use_rslora { (r as f64).sqrt() } else { r as f64 };
        let base = Linear::new(base.weight().detach(), base.bias().map(Tensor::detach));
        Ok(Self { site, base, lora_a, lora_b, scaling, merged: None })
    }

    /// The frozen layer, without the adapter.
    pub fn base_layer(&self) -> &Linear {
        &self.base
    }

    /// `A`, `[r, in]`.
    pub fn lora_a(&self) -> &Tensor {
        &self.lora_a
    }

    /// `B`, `[out, r]`.
    pub fn lora_b(&self) -> &Tensor {
        &self.lora_b
    }

    /// What the adapter's result is multiplied by.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// The mask of this call, over what goes into the adapter: for callers of [`dropout_linear`] itself.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.site.next_mask(NAME, train)
    }

    /// The frozen layer and its adapter, whose input drops if `train` is true; or one product, where they are merged.
    ///
    /// # Errors
    /// `train` is true and the adapter is merged, where it would not learn; the tensor is refused by
    /// [`dropout_linear`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        if let Some(merged) = &self.merged {
            if train {
                bail!(
                    "{NAME}: train: expected false where the adapter is merged, got true; call unmerge before \
                     training goes on"
                )
            }
            return merged.forward(xs);
        }
        let drop = self.next_mask(train)?;
        let y = self.base.forward(xs)?;
        let xs = xs.to_dtype(self.lora_a.dtype())?;
        // Scaled where it is narrow.
        let low_rank = times(&dropout_linear(&xs, &self.lora_a, None, &drop)?, self.scaling)?;
        let delta = linear_out_in(&low_rank, &self.lora_b, None)?.to_dtype(y.dtype())?;
        y + delta
    }

    /// Adds the adapter as it is now to the weight, `W + scaling B A`: a call then costs one product. The frozen weight
    /// is kept beside it. Merged again, it is made anew of that one.
    ///
    /// Sums are rounded to the dtype of the weight, so that results agree with those of before to rounding.
    ///
    /// # Errors
    /// The adapter lies on another device than the weight.
    pub fn merge(&mut self) -> Result<()> {
        let weight = self.base.weight();
        check_device(NAME, "lora_A", &self.lora_a, "base", weight.device())?;
        let [a, b] = [wide(&self.lora_a.detach())?, wide(&self.lora_b.detach())?];
        let whole = wide(weight)?;
        let sum = (&whole + (b.matmul(&a)? * self.scaling)?.to_dtype(whole.dtype())?)?;
        let merged = sum.to_dtype(weight.dtype())?;
        self.merged = Some(Linear::new(merged, self.base.bias().cloned()));
        Ok(())
    }

    /// Takes the adapter out of the weight, which is then, bit for bit, what it was.
    pub fn unmerge(&mut self) {
        self.merged = None;
    }

    /// True between [`merge`](Self::merge) and [`unmerge`](Self::unmerge).
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// The weight that a call multiplies with: the frozen one, or the merged one, to save it.
    pub fn weight(&self) -> &Tensor {
        self.merged.as_ref().unwrap_or(&self.base).weight()
    }
}

rate_methods!(LoraLinear, site);

module_methods!(LoraLinear);
