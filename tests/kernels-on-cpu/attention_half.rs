//! `kernels/attention_half.cu` against its formula in f64.

use crate::attention::*;
use crate::harness::Program;
use crate::launch::{ATTENTION_HALF_HEAD_SIZES, attention_half};

static PROGRAM: Program = Program::new("kernels/attention_half.cu");

const HALVES: Kernels =
    Kernels { program: &PROGRAM, head_sizes: &ATTENTION_HALF_HEAD_SIZES, launch: attention_half };

/// Runs `$test::<T>(&HALVES, ..)` for both halves.
macro_rules! for_each_half {
    ($test:ident($forms:expr)) => {{
        $test::<half::f16>(&HALVES, $forms);
        $test::<half::bf16>(&HALVES, $forms);
    }};
}

#[test]
fn forward_and_backward_equal_the_formula() {
    for_each_half!(equal_the_formula(&shapes(&[1, 32, 40, 64, 96, 128, 256])));
}

#[test]
fn features_equal_the_formula() {
    for_each_half!(equal_the_formula(&features()));
}

#[test]
fn tensors_may_lie_anywhere() {
    for_each_half!(equal_the_formula(&layouts()));
}

#[test]
fn windows_are_parts_of_the_whole_mask() {
    for_each_half!(equal_the_formula(&masks()));
}

#[test]
fn the_mask_is_that_of_the_law_in_every_bit() {
    let mut forms = vec![
        Form::new([100, 130, 64], 0.1),
        Form::with_heads([2, 2, 2], [33, 70, 40], 0.5),
        Form::new([40, 60, 128], 0.3),
        Form::new([20, 40, 256], 0.3),
    ];
    forms.extend(masks().into_iter().filter(|form| form.heads == form.kv_heads));
    for_each_half!(draw_the_law(&forms));
}

#[test]
fn errors_are_no_larger_than_those_of_the_naive_formula() {
    let forms = [
        Form::with_heads([1, 2, 1], [90, 150, 64], 0.1).causal(),
        Form::new([70, 70, 128], 0.),
        Form { softcap: 3., ..Form::new([70, 100, 64], 0.1) },
    ];
    for_each_half!(err_no_more_than_the_naive_formula(&forms));
}
