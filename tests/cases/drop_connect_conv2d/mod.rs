//! `drop_connect_conv2d`. A size is `[B, in, H, W]`.

mod formula;

use candle_core::{Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::drop_connect_conv2d;
use candle_nn::Conv2dConfig;

pub use formula::formula;

use crate::Case;

#[derive(Debug)]
struct DropConnectConv2d {
    name: &'static str,
    outputs: usize,
    kernel: [usize; 2],
    config: Conv2dConfig,
    has_bias: bool,
}

const PLAIN: Conv2dConfig =
    Conv2dConfig { padding: 0, stride: 1, dilation: 1, groups: 1, cudnn_fwd_algo: None };

pub const CASES: &[&dyn Case] = &[
    &DropConnectConv2d {
        name: "drop_connect_conv2d",
        outputs: 5,
        kernel: [3, 3],
        config: Conv2dConfig { padding: 1, ..PLAIN },
        has_bias: false,
    },
    &DropConnectConv2d {
        name: "drop_connect_conv2d_strided_bias",
        outputs: 3,
        kernel: [3, 2],
        config: Conv2dConfig { padding: 2, stride: 3, ..PLAIN },
        has_bias: true,
    },
    &DropConnectConv2d {
        name: "drop_connect_conv2d_grouped_dilated_bias",
        outputs: 4,
        kernel: [2, 3],
        config: Conv2dConfig { padding: 1, stride: 2, dilation: 2, groups: 2, ..PLAIN },
        has_bias: true,
    },
    &DropConnectConv2d {
        name: "drop_connect_conv2d_pixels",
        outputs: 7,
        kernel: [1, 1],
        config: PLAIN,
        has_bias: false,
    },
    &DropConnectConv2d {
        name: "drop_connect_conv2d_strided_pixels_bias",
        outputs: 2,
        kernel: [1, 1],
        config: Conv2dConfig { padding: 3, stride: 4, ..PLAIN },
        has_bias: true,
    },
];

impl Case for DropConnectConv2d {
    fn name(&self) -> &'static str {
        self.name
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        let [height, width] = self.kernel;
        let of_group = size.get(1).copied().unwrap_or(1) / self.config.groups;
        let mut arguments = vec![size.to_vec(), vec![self.outputs, of_group, height, width]];
        arguments.extend(self.has_bias.then(|| vec![self.outputs]));
        arguments
    }

    fn takes(&self, size: &[usize]) -> bool {
        let &[_, inputs, height, width] = size else { return false };
        inputs % self.config.groups == 0 && self.steps([height, width]).is_some()
    }

    fn fitting(&self, size: &[usize]) -> Vec<usize> {
        if self.takes(size) { size.to_vec() } else { vec![2, 4, 5, 6] }
    }

    fn awkward(&self) -> &'static [&'static [usize]] {
        &[&[1, 1, 3, 3], &[2, 3, 7, 5], &[1, 2, 11, 13], &[3, 4, 6, 9], &[2, 6, 8, 4]]
    }

    fn largest_argument(&self) -> f64 {
        2.
    }

    fn output(&self, arguments: &[Vec<usize>]) -> Vec<usize> {
        let [height, width] = self.steps([arguments[0][2], arguments[0][3]]).unwrap_or([0, 0]);
        vec![arguments[0][0], self.outputs, height, width]
    }

    fn mask_dims(&self, size: &[usize]) -> Option<Vec<usize>> {
        Some(self.arguments(size)[1].clone())
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![drop_connect_conv2d(&args[0], &args[1], args.get(2), self.config, drop)?])
    }

    fn formula(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        keep: &Tensor,
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        Ok(vec![formula(&args[0], &args[1], args.get(2), self.config, keep, scale)?])
    }
}

impl DropConnectConv2d {
    /// How many windows an image of this height and width has.
    fn steps(&self, image: [usize; 2]) -> Option<[usize; 2]> {
        let Conv2dConfig { padding, stride, dilation, .. } = self.config;
        let steps = |dim: usize| {
            let window = dilation * (self.kernel[dim] - 1) + 1;
            (image[dim] + 2 * padding).checked_sub(window).map(|rest| rest / stride + 1)
        };
        Some([steps(0)?, steps(1)?])
    }
}
