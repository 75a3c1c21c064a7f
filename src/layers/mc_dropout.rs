use candle_core::{D, Result, Tensor, bail};

use crate::check::check_dtype;
use crate::composed::{log_softmax, scalar, select, wide};
use crate::mask::{Repeated, repeat};

/// Monte-Carlo dropout: the predictions of `T` networks that a model with dropout holds, and how far they disagree.
///
/// ```text
/// y_t = model(x; masks t)          mean = 1/T Σ_t y_t          variance = 1/T Σ_t (y_t - mean)²
/// ```
///
/// All passes are one forward: the batch is repeated `T` times along its first dimension, `[T B, ..]`, and in
/// repetition `t` a site sees the mask of `key.draw(t)`, from the row of the first sample on. So the masks of a sample
/// in pass `t` depend neither on `T` nor on which samples are predicted together: data that goes through in batches of
/// any size gives the same answers, and the first passes of many are those of few. (They do bit for bit where the model
/// gives a row of a batch the same bits in any batch; the sums of a matrix product may be in another order for another
/// number of rows.)
///
/// Keys are those of a generator of its own, which begins anew at every call: predictions repeat, and the generators of
/// the model stay where they are. Any layer of this crate draws from it that is called with `train` while the model
/// runs, in the thread that called.
///
/// # Shapes
/// `x` `[B, ..]`; the model maps `[T B, ..]` to the same first dimension, and treats each sample by itself. Wherever it
/// drops, the first dimension is that of the batch: a multiple of `T B`, where it is flattened with those behind it. Any
/// other number is an error; tokens that come before the batch, `[S, T B, C]`, are one unless `S` is a multiple, too.
///
/// # Dtypes
/// Those of the model.
///
/// # Randomness
/// Pass `t` at the site that draws as `n`-th, from 0 on, has the mask of `MaskKey::derive(seed, n).draw(t)`.
///
/// Gal, Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty in deep learning", 2016,
/// arXiv 1506.02142 (the variance of eq. 9 without the noise of observations, `1/τ`).
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{Dropout, McDropout};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = Dropout::new(0.5);
/// let x = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
/// let mc = McDropout::new(1000, 42)?;
/// let prediction = mc.predict(&x, 0, |xs, train| layer.forward(xs, train))?;
/// assert_eq!(prediction.samples().dims(), [1000, 2, 3]);
/// for mean in prediction.mean()?.flatten_all()?.to_vec1::<f32>()? {
///     assert!((mean - 1.).abs() < 0.2);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct McDropout {
    samples: usize,
    seed: u64,
}

const NAME: &str = "mc_dropout";

impl McDropout {
    /// `samples` passes, with the masks that `seed` names.
    ///
    /// # Errors
    /// `samples` is 0.
    pub fn new(samples: usize, seed: u64) -> Result<Self> {
        if samples == 0 {
            bail!("{NAME}: samples: expected at least 1 pass, got 0; some dozens are usual")
        }
        Ok(Self { samples, seed })
    }

    /// The passes of one prediction.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Runs `model(xs, true)` on the repeated batch. `first_sample` is the index of the first sample of `x` in the data
    /// of which it is a batch, which says where its masks begin: 0 for data in one batch.
    ///
    /// Layers that behave otherwise in training than in evaluation, and are no dropout, the model calls without
    /// `train`: batch normalisation with its statistics of training.
    ///
    /// # Errors
    /// `x` has no samples; the model fails, or drops where the first dimension is not that of the batch, or returns
    /// another first dimension.
    pub fn predict(
        &self,
        x: &Tensor,
        first_sample: usize,
        model: impl FnOnce(&Tensor, bool) -> Result<Tensor>,
    ) -> Result<McPrediction> {
        let (times, dims) = (self.samples, x.dims());
        let samples = match dims.first() {
            Some(samples) if *samples > 0 => *samples,
            _ => bail!(
                "{NAME}: x: expected [B, ..] with at least one sample, got {dims:?}; unsqueeze(0) a single one"
            ),
        };
        let xs = Tensor::cat(&vec![x; times], 0)?; // [T B, ..]
        let ys = {
            let _masks = repeat(self.seed, Repeated { times, samples, first: first_sample });
            model(&xs, true)?
        };
        match ys.dims() {
            [len, rest @ ..] if *len == times * samples => {
                let dims = [&[times, samples], rest].concat();
                Ok(McPrediction { samples: ys.reshape(dims)? })
            }
            got => bail!(
                "{NAME}: model: expected a result for each of {times} passes of {samples} samples in its first \
                 dimension, got {got:?}; keep the batch in the first dimension"
            ),
        }
    }
}

/// What the passes of a [`McDropout`] have predicted, and what follows from it.
///
/// Moments are computed in f32 where predictions are halves, and entropies, in nats, of logits over the last dimension:
///
/// ```text
/// p = 1/T Σ_t softmax(y_t)                   predictive entropy = -Σ_c p_c log p_c
/// mutual information = predictive entropy - 1/T Σ_t entropy(softmax(y_t)) = 1/T Σ_t KL(softmax(y_t) || p)
/// ```
///
/// The mutual information of prediction and weights is high where passes are sure of different classes (the model
/// does not know), and low where they agree, be it that classes are as likely as one another (nobody knows). It is
/// computed as the mean of divergences, from logarithms, so that small ones keep their digits.
///
/// Houlsby, Huszár, Ghahramani, Lengyel, "Bayesian active learning for classification and preference learning", 2011,
/// arXiv 1112.5745 (eq. 2, BALD); Gal, Islam, Ghahramani, "Deep Bayesian active learning with image data", 2017, arXiv
/// 1703.02910 (its estimate by Monte-Carlo dropout).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{Dropout, McDropout};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = Dropout::new(0.5);
/// let logits = Tensor::new(&[[0f32, 0.], [9., 9.]], &Device::Cpu)?;
/// let mc = McDropout::new(64, 42)?;
/// let prediction = mc.predict(&logits, 0, |xs, train| layer.forward(xs, train))?;
/// let information = prediction.mutual_information()?.to_vec1::<f32>()?;
/// assert_eq!(information[0], 0.); // its passes agree that nobody knows
/// assert!(information[1] > 0.2); // these are sure of one class, of the other, or of none
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct McPrediction {
    samples: Tensor,
}

impl McPrediction {
    /// The results of all passes, `[T, B, ..]`.
    pub fn samples(&self) -> &Tensor {
        &self.samples
    }

    /// That of the first `t` passes alone: of a [`McDropout`] with as many.
    ///
    /// # Errors
    /// `t` is 0 or above the number of passes.
    pub fn prefix(&self, t: usize) -> Result<Self> {
        let times = self.samples.dim(0)?;
        if !(1..=times).contains(&t) {
            bail!("{NAME}: prefix: expected 1 to {times} passes, got {t}; predict with more")
        }
        Ok(Self { samples: self.samples.narrow(0, 0, t)? })
    }

    /// The mean over the passes, `[B, ..]`.
    ///
    /// # Errors
    /// Predictions are no floats.
    pub fn mean(&self) -> Result<Tensor> {
        self.wide()?.mean(0)
    }

    /// The variance over the passes, `[B, ..]`: the mean of squared distances from the mean, 0 of one pass.
    ///
    /// # Errors
    /// Predictions are no floats.
    pub fn variance(&self) -> Result<Tensor> {
        let samples = self.wide()?;
        samples.broadcast_sub(&samples.mean_keepdim(0)?)?.sqr()?.mean(0)
    }

    /// The mean of the softmax of each pass, `[B, .., classes]`, of predictions that are logits.
    ///
    /// # Errors
    /// Predictions are no floats, or have no classes.
    pub fn probabilities(&self) -> Result<Tensor> {
        mean_log_probs(&self.log_probs()?)?.exp()
    }

    /// The entropy of those probabilities, `[B, ..]`: all that is unknown about a class.
    ///
    /// # Errors
    /// Predictions are no floats, or have no classes.
    pub fn predictive_entropy(&self) -> Result<Tensor> {
        entropy(&mean_log_probs(&self.log_probs()?)?)
    }

    /// The mean entropy of the passes, `[B, ..]`: the part that no training data would mend.
    ///
    /// # Errors
    /// Predictions are no floats, or have no classes.
    pub fn expected_entropy(&self) -> Result<Tensor> {
        entropy(&self.log_probs()?)?.mean(0)
    }

    /// The mutual information of class and weights, `[B, ..]`, at least 0: the part that is the model's.
    ///
    /// # Errors
    /// Predictions are no floats, or have no classes.
    pub fn mutual_information(&self) -> Result<Tensor> {
        let log_probs = self.log_probs()?;
        let above_mean = log_probs.broadcast_sub(&mean_log_probs(&log_probs)?)?;
        weighted(&log_probs, &above_mean)?.sum(D::Minus1)?.mean(0)?.relu()
    }

    fn wide(&self) -> Result<Tensor> {
        check_dtype(NAME, "samples", &self.samples)?;
        wide(&self.samples)?.contiguous()
    }

    /// `log softmax` of each pass, `[T, B, .., classes]`.
    fn log_probs(&self) -> Result<Tensor> {
        let dims = self.samples.dims();
        if dims.len() < 3 || dims.last() == Some(&0) {
            bail!(
                "{NAME}: samples: expected logits [T, B, .., classes], got {dims:?}; have the model return one for \
                 each class"
            )
        }
        log_softmax(&self.wide()?)
    }
}

/// The logarithm of the mean over the passes, from the largest on, so that none vanishes.
fn mean_log_probs(log_probs: &Tensor) -> Result<Tensor> {
    let times = log_probs.dim(0)? as f64;
    let max = log_probs.detach().max_keepdim(0)?;
    // That of a class that has no probability in any pass is -inf, and no distance from it a number.
    let max = max.maximum(&scalar(f64::from(f32::MIN), &max)?.broadcast_as(max.shape())?)?;
    let mean = (log_probs.broadcast_sub(&max)?.exp()?.sum(0)? / times)?;
    mean.log()? + max.squeeze(0)?
}

/// `-Σ p log p` over the last dimension.
fn entropy(log_probs: &Tensor) -> Result<Tensor> {
    weighted(log_probs, log_probs)?.sum(D::Minus1)?.neg()
}

/// `p * x`, and 0 where a class has no probability, whatever `x` is.
fn weighted(log_probs: &Tensor, x: &Tensor) -> Result<Tensor> {
    let probs = log_probs.exp()?;
    &probs * select(&probs.gt(0.)?, x, 0.)?
}
