use candle_core::{Result, bail};

use super::NAME;

/// Which blocks [`drop_block`](super::drop_block()) drops; the defaults are timm's.
///
/// timm's `with_noise`, which puts normal noise where a block is dropped, is not here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DropBlockConfig {
    /// The side of a block, at least 1, usually odd; clipped to the height and to the width.
    pub block_size: usize,
    /// Multiplies the rate of seeds.
    pub gamma_scale: f64,
    /// All channels of a sample share their blocks, as in timm. The paper found that each channel had better have its
    /// own (section 3): false.
    pub couple_channels: bool,
    /// Multiplies what is kept by elements over elements kept, so that a mean stays.
    pub scale_by_keep: bool,
    /// Seeds lie anywhere, and their blocks are clipped at the borders, as timm has it since 1.0.23; false: only where
    /// a block lies in its plane as a whole, as in the paper.
    pub fast: bool,
}

impl Default for DropBlockConfig {
    fn default() -> Self {
        Self {
            block_size: 7,
            gamma_scale: 1.,
            couple_channels: true,
            scale_by_keep: true,
            fast: true,
        }
    }
}

impl DropBlockConfig {
    /// The rate of seeds at which about `drop_p` of a plane is dropped (eq. 1 of the paper).
    ///
    /// ```text
    /// gamma = gamma_scale * drop_p * H W / (bh bw) / ((H - bh + 1) (W - bw + 1))        bh, bw: the clipped block
    /// ```
    ///
    /// # Errors
    /// `drop_p` is no probability, or gamma is none; `block_size` is 0.
    pub fn gamma(&self, drop_p: impl Into<f64>, height: usize, width: usize) -> Result<f64> {
        let drop_p = drop_p.into();
        self.check()?;
        if !(0. ..=1.).contains(&drop_p) {
            bail!(
                "{NAME}: drop_p: expected a probability of dropping in [0, 1], got {drop_p}; pass 0 to drop nothing"
            )
        }
        if height == 0 || width == 0 {
            return Ok(0.);
        }
        let of_axis = |size: usize| {
            let block = clipped(self, size);
            size as f64 / (block as f64 * (size - block + 1) as f64)
        };
        let gamma = self.gamma_scale * drop_p * of_axis(height) * of_axis(width);
        if !(0. ..=1.).contains(&gamma) {
            bail!(
                "{NAME}: gamma_scale: expected a rate of seeds in [0, 1], got {gamma} from {} at drop_p {drop_p} and \
                 planes [{height}, {width}]; lower it",
                self.gamma_scale
            )
        }
        Ok(gamma)
    }

    /// Refuses a block of no size.
    pub(super) fn check(&self) -> Result<()> {
        if self.block_size == 0 {
            bail!("{NAME}: block_size: expected at least 1, got 0; pass 1 to drop single elements")
        }
        Ok(())
    }
}

/// The side of a block along an axis of this size.
pub(super) fn clipped(config: &DropBlockConfig, size: usize) -> usize {
    config.block_size.min(size)
}
