use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::site::{Site, rate_methods};
use crate::functional::embedding_dropout;
use crate::mask::{DropMask, MaskGenerator};

/// Drops whole words of a text, wherever they occur: [`embedding_dropout`] with the mask `[V]` over the vocabulary.
///
/// # Shapes
/// Embeddings `[.., D]` and the ids `[..]` that they were looked up by.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU; ids u32 or i64.
///
/// Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", 2016, arXiv
/// 1512.05287 (section 4.2); Merity, Keskar, Socher, "Regularizing and optimizing LSTM language models", 2017, arXiv
/// 1708.02182 (section 4.3, `embedded_dropout` of AWD-LSTM).
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_dropout::{EmbeddingDropout, MaskGenerator};
/// use candle_nn::Embedding;
///
/// # fn main() -> candle_core::Result<()> {
/// let embedding = Embedding::new(Tensor::ones((100, 4), DType::F32, &Device::Cpu)?, 4);
/// let layer = EmbeddingDropout::new(0.5, Arc::new(MaskGenerator::new(42)))?;
/// let ids = Tensor::new(&[[7u32, 9, 7, 7]], &Device::Cpu)?;
/// let y = layer.forward(&embedding.forward(&ids)?, &ids, true)?.to_vec3::<f32>()?;
/// assert!(y[0][0] == y[0][2] && y[0][0] == y[0][3], "all or none of a word");
/// # Ok(())
/// # }
/// ```
#[doc(alias = "embedded_dropout")]
#[derive(Clone, Debug)]
pub struct EmbeddingDropout(Site);

const NAME: &str = "embedding_dropout";

impl EmbeddingDropout {
    /// A layer that drops each word of the vocabulary with probability `drop_p`.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        Site::new(drop_p, generator).checked(NAME).map(Self)
    }

    /// The mask of this call, of shape `[V]`.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.0.next_mask(NAME, train)
    }

    /// Drops words if `train` is true.
    ///
    /// # Errors
    /// The rate is no probability, or the tensors are refused by [`embedding_dropout`].
    pub fn forward(&self, embedded: &Tensor, ids: &Tensor, train: bool) -> Result<Tensor> {
        embedding_dropout(embedded, ids, &self.next_mask(train)?)
    }
}

rate_methods!(EmbeddingDropout, 0);
