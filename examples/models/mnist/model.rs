use candle_core::{D, ModuleT, Result, Tensor};
use candle_dropout::nn::{Conv2d, Dropout, Linear, VarBuilder, conv2d, linear};

/// Two convolutions, each with a pooling, and two layers with dropout between them.
pub struct Cnn {
    conv_1: Conv2d,
    conv_2: Conv2d,
    hidden: Linear,
    dropout: Dropout,
    head: Linear,
}

impl Cnn {
    pub fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            conv_1: conv2d(1, 16, 5, Default::default(), vb.pp("conv_1"))?,
            conv_2: conv2d(16, 32, 5, Default::default(), vb.pp("conv_2"))?,
            hidden: linear(32 * 4 * 4, 128, vb.pp("hidden"))?,
            dropout: Dropout::new(0.5),
            head: linear(128, 10, vb.pp("head"))?,
        })
    }
}

/// The largest of each 2 x 2 pixels of `[B, C, H, W]`, for even `H` and `W`. Not candle's `max_pool2d(2)`, which
/// passes back a quarter of the gradient; nor its `max`, which passes all of it to each of several equal ones.
pub fn max_pool(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let windows = x.reshape((b * c, h / 2, 2, w / 2, 2))?.transpose(2, 3)?;
    let windows = windows.reshape((b, c, h / 2, w / 2, 4))?;
    windows.gather(&windows.argmax_keepdim(D::Minus1)?, D::Minus1)?.squeeze(D::Minus1)
}

impl ModuleT for Cnn {
    /// Logits `[B, 10]` of images `[B, 1, 28, 28]`.
    fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let x = max_pool(&images.apply(&self.conv_1)?)?.relu()?; // [B, 16, 12, 12]
        let x = max_pool(&x.apply(&self.conv_2)?)?.relu()?; // [B, 32, 4, 4]
        let x = x.flatten_from(1)?.apply(&self.hidden)?.relu()?; // [B, 128]
        self.dropout.forward(&x, train)?.apply(&self.head)
    }
}
