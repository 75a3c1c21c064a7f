use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::site::{Site, module_methods};
use crate::check::check_dtype;
use crate::composed::select;
use crate::graph::node;
use crate::mask::{DropMask, MaskArgs, MaskGenerator, NO_WIDE_DRAWS};

/// Cutout as a layer: fills one square of each image in training, whose centre lies anywhere in the image.
///
/// ```text
/// rows    centre_h - length/2 .. centre_h - length/2 + length, clipped at the borders; columns likewise
/// y = cut ? fill : x            dx = cut ? 0 : dy
/// ```
///
/// Nothing is scaled. In training it draws one key a call; the centre of sample `n` are the wide draws of the mask law
/// in row `n`, times height and width. In evaluation it is the identity and draws none. Backward keeps the key, and
/// makes the squares again.
///
/// # Shapes
/// `[N, C, H, W]`; all channels of a sample lose the same square.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU.
///
/// # Errors
/// `forward` fails, in training, if `xs` is no float tensor or has not four dimensions.
///
/// DeVries, Taylor, "Improved regularization of convolutional neural networks with Cutout", 2017, arXiv 1708.04552.
/// The paper's program takes `length / 2` to both sides, which for an odd length is one row and column less.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{Cutout, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = Cutout::new(16, Arc::new(MaskGenerator::new(42)))?;
/// let images = Tensor::ones((8, 3, 32, 32), DType::F32, &Device::Cpu)?;
/// let left = layer.forward(&images, true)?.sum_all()?.to_scalar::<f32>()?;
/// // A square is at least a quarter and at most a whole of 16 x 16.
/// assert!((8 * 3 * (32 * 32 - 256)..=8 * 3 * (32 * 32 - 64)).contains(&(left as i32)));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Cutout {
    site: Site,
    length: usize,
    fill: f64,
}

const NAME: &str = "cutout";

impl Cutout {
    /// A layer that zeroes a square of side `length`; the paper has 16 for CIFAR-10, 8 for CIFAR-100 and 20 for SVHN.
    ///
    /// # Errors
    /// `length` is 0.
    pub fn new(length: usize, generator: Arc<MaskGenerator>) -> Result<Self> {
        if length == 0 {
            bail!("{NAME}: length: expected at least 1, got 0; leave the layer out to cut nothing")
        }
        // Every image is cut: a key alone is drawn, at no rate.
        Ok(Self { site: Site::new(0., generator), length, fill: 0. })
    }

    /// The same layer, with another number in the square.
    pub fn with_fill(self, fill: f64) -> Self {
        Self { fill, ..self }
    }

    /// The side of the square.
    pub fn length(&self) -> usize {
        self.length
    }

    /// What the square is filled with.
    pub fn fill(&self) -> f64 {
        self.fill
    }

    /// Fills a square of each image if `train` is true.
    ///
    /// # Errors
    /// `xs` is no float tensor, f64 off the CPU, or not of four dimensions.
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let drop = self.site.next_mask(NAME, train)?;
        if !train {
            return Ok(xs.clone());
        }
        check_dtype(NAME, "xs", xs)?;
        if xs.rank() != 4 {
            bail!("{NAME}: xs: expected [N, C, H, W], got {:?}; reshape it", xs.dims())
        }
        if let Some(repeats) = drop.repeats(NAME, xs.dims(), Some(0))? {
            return repeats.each(|part| self.cut(&part.of("xs", xs)?, &part.drop));
        }
        self.cut(xs, &drop)
    }

    /// The squares of a mask `[N, 2]`.
    fn cut(&self, xs: &Tensor, drop: &DropMask) -> Result<Tensor> {
        let (n, _, height, width) = xs.dims4()?;
        let squares =
            Squares { mask: drop.args(NAME, &[n, 2])?, n, height, width, length: self.length };
        if xs.elem_count() == 0 {
            return Ok(xs.clone());
        }
        let y = squares.fill(xs, self.fill)?;
        let (storage, layout) = y.storage_and_layout();
        node(NAME, [Some(xs)], (storage.try_clone(layout)?, xs.shape()), move |back| {
            Ok([Some(squares.fill(back.dy, 0.)?)])
        })
    }
}

module_methods!(Cutout);

/// The squares of one call.
#[derive(Clone, Copy)]
struct Squares {
    /// Of the centres, `[N, 2]`.
    mask: MaskArgs,
    n: usize,
    height: usize,
    width: usize,
    length: usize,
}

impl Squares {
    /// `x` with its squares filled, contiguous and no part of a graph.
    fn fill(&self, x: &Tensor, fill: f64) -> Result<Tensor> {
        select(&self.kept(x)?, &x.detach().contiguous()?, fill)?.contiguous()
    }

    /// `[N, 1, H, W]`, 1 outside of the squares.
    fn kept(&self, x: &Tensor) -> Result<Tensor> {
        let &Self { n, height, width, length, .. } = self;
        let mut kept = vec![1u8; n * height * width];
        let mut room = NO_WIDE_DRAWS;
        for (sample, kept) in kept.chunks_exact_mut(height * width).enumerate() {
            let draws = self.mask.wide_draws(sample, 0, 2, &mut room);
            let side = |draw: u32, size: usize| {
                let centre = ((u64::from(draw) * size as u64) >> 32) as usize;
                let end = centre.saturating_add(length - length / 2).min(size);
                centre.saturating_sub(length / 2)..end
            };
            let (rows, cols) = (side(draws[0], height), side(draws[1], width));
            for row in kept.chunks_exact_mut(width).take(rows.end).skip(rows.start) {
                row[cols.clone()].fill(0);
            }
        }
        Tensor::from_vec(kept, (n, 1, height, width), x.device())
    }
}
