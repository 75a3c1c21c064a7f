//! `kernels/attention_f32.cu` against its formula in f64.

use candle_dropout::AttentionPass;

use super::checks::*;
use super::form::{Form, features, layouts, masks, shapes};
use super::run::Kernels;
use crate::host::Program;

static PROGRAM: Program = Program::new("kernels/attention_f32.cu");

const KERNELS: Kernels = Kernels {
    program: &PROGRAM,
    head_sizes: &AttentionPass::F32_HEAD_SIZES,
    launch: AttentionPass::launch_f32,
};

#[test]
fn forward_and_backward_equal_the_formula() {
    equal_the_formula::<f32>(&KERNELS, &shapes(&[1, 7, 32, 64, 80, 128, 200, 256]));
}

#[test]
fn features_equal_the_formula() {
    equal_the_formula::<f32>(&KERNELS, &features());
}

#[test]
fn tensors_may_lie_anywhere() {
    equal_the_formula::<f32>(&KERNELS, &layouts());
}

#[test]
fn windows_are_parts_of_the_whole_mask() {
    equal_the_formula::<f32>(&KERNELS, &masks());
}

#[test]
fn the_mask_is_that_of_the_law_in_every_bit() {
    let mut forms = vec![
        Form::new([100, 130, 64], 0.1),
        Form::with_heads([2, 2, 2], [33, 70, 40], 0.5),
        Form::new([40, 60, 130], 0.3),
        Form::new([20, 20, 200], 0.3),
    ];
    forms.extend(masks().into_iter().filter(|form| form.heads == form.kv_heads));
    draw_the_law::<f32>(&KERNELS, &forms);
}

#[test]
fn errors_are_no_larger_than_those_of_the_naive_formula() {
    let forms = [
        Form::with_heads([1, 2, 1], [90, 150, 64], 0.1).causal(),
        Form::new([70, 70, 128], 0.),
        Form { softcap: 3., ..Form::new([70, 100, 64], 0.1) },
    ];
    err_no_more_than_the_naive_formula::<f32>(&KERNELS, &forms);
}
