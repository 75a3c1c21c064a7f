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

// mutant: keys not transposed|s/key % 8 \* 8 \+ key \/ 8/key/
// mutant: rows before the first|s/first \+ r >= rows\.begin && //
// mutant: mask of one head|s/map\(first_row \+ row\)/map(row)/
// mutant: hidden keys seen|s/query\.sees\(key \+ j\) \? logit : -INFINITY/logit/
// mutant: nothing visible yet|s/new_max == -INFINITY \? 0\.f : new_max/new_max/
// mutant: sum keeps its maximum|s/shrink = exp2f\(max\[r\] - base\)/shrink = 1.f/
// mutant: nothing dropped|s/= !DROPS \|\| keeps\(drop, draws\[j\]\) \? e : 0\.f/= e/
// mutant: denominator drops|s/sums\[r\] \+= e;/sums[r] += !DROPS || keeps(drop, draws[j]) ? e : 0.f;/
// mutant: rows that see nothing|s/sum == 0\.f \? 0\.f : o_sums/o_sums/
// mutant: lse of such rows|s/sum == 0\.f \? INFINITY : \(max/(max/
// mutant: y of hidden keys|s/query\.sees\(key \+ j\) && keep \? p/keep ? p/
// mutant: ds of hidden keys|s/query\.sees\(key \+ j\) \? p \* /true ? p * /
// mutant: dP not dropped|s/keep \? \(DROPS \? drop\.scale \* dp\[j\] : dp\[j\]\) : 0\.f/drop.scale * dp[j]/
// mutant: delta lost|s/p \* \(kept_dp - delta\)/p * kept_dp/
// mutant: dq, lse past its end|s/min\(row, last_query\)/row/
// mutant: dk, lse past its end|s/min\(row, args\.queries - 1\)/row/
// mutant: first head of a group|s/head < \(kv_head \+ 1\) \* group/head < kv_head * group + 1/
// mutant: dv without its scale|s/dv_factor = DROPS \? drop\.scale : 1\.f/dv_factor = 1.f/
