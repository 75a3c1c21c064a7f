//! `kernels/attention_f32.cu` against its formula in f64.

use candle_dropout::functional::AttentionPass;

use super::checks::*;
use super::form::{Form, drop_keys, far, features, layouts, masks, shapes};
use super::run::Kernels;
use crate::host::{Program, skip_without_compiler};

static PROGRAM: Program = Program::new("kernels/attention_f32.cu");

const KERNELS: Kernels = Kernels {
    program: &PROGRAM,
    head_sizes: &AttentionPass::F32_HEAD_SIZES,
    launch: AttentionPass::launch_f32,
    unit_logit: 1.,
};

#[test]
fn forward_and_backward_equal_the_formula() {
    skip_without_compiler!();
    equal_the_formula::<f32>(&KERNELS, &shapes(&[1, 7, 32, 64, 80, 128, 200, 256]));
}

#[test]
fn features_equal_the_formula() {
    skip_without_compiler!();
    equal_the_formula::<f32>(&KERNELS, &features());
}

#[test]
fn tensors_may_lie_anywhere() {
    skip_without_compiler!();
    equal_the_formula::<f32>(&KERNELS, &layouts());
}

#[test]
fn windows_are_parts_of_the_whole_mask() {
    skip_without_compiler!();
    equal_the_formula::<f32>(&KERNELS, &masks());
}

#[test]
fn dropped_keys_are_as_if_hidden() {
    skip_without_compiler!();
    equal_the_formula::<f32>(&KERNELS, &drop_keys(&[64, 128, 256]));
}

#[test]
fn scores_far_from_0_keep_their_digits() {
    skip_without_compiler!();
    lose_no_digits_far_from_0::<f32>(&KERNELS, &far());
}

#[test]
fn the_mask_is_that_of_the_law_in_every_bit() {
    skip_without_compiler!();
    let mut forms = vec![
        Form::new([100, 130, 64], 0.1),
        Form::with_heads([2, 2, 2], [33, 70, 40], 0.5),
        Form { drop_key: true, ..Form::with_heads([1, 2, 2], [33, 70, 40], 0.5) },
        Form::new([40, 60, 130], 0.3),
        Form::new([20, 20, 200], 0.3),
    ];
    forms.extend(masks().into_iter().filter(|form| form.heads == form.kv_heads));
    draw_the_law::<f32>(&KERNELS, &forms);
}

#[test]
fn errors_are_no_larger_than_those_of_the_naive_formula() {
    skip_without_compiler!();
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
// mutant: hidden keys seen|s/query\.sees\(key \+ j, keep\) \? logit : -INFINITY/logit/
// mutant: dropped keys seen|s/ && \(keep \|\| !drops_keys\)//
// mutant: forward sees dropped keys|s/query\.sees\(key \+ j, keep\) \? logit/query.sees(key + j, true) ? logit/
// mutant: backward sees dropped keys|s/sees = query\.sees\(key \+ j, keep\)/sees = query.sees(key + j, true)/
// mutant: weights dropped as keys|s/\(keep \|\| !drops_keys\)/keep/
// mutant: nothing visible yet|s/new_max == -INFINITY \? 0\.f : new_max/new_max/
// mutant: sum keeps its maximum|s/shrink = exponential_of\(max\[r\] - base\)/shrink = 1.f/
// mutant: nothing dropped|s/= !DROPS \|\| keeps\(drop, draws\[j\]\) \? e : 0\.f/= e/
// mutant: denominator drops|s/sums\[r\] \+= e;/sums[r] += !DROPS || keeps(drop, draws[j]) ? e : 0.f;/
// mutant: rows that see nothing|s/sum == 0\.f \? 0\.f : o_sums/o_sums/
// mutant: reference and normaliser in one|s/exponential_of\(logit - softmax\.reference\) \* softmax\.normaliser/exponential_of(logit - (softmax.reference - logf(softmax.normaliser)))/
// mutant: products with log2 of e rounded|s/= exponential_of\(s\[r\]\[j\] - base\)/= exp2f(s[r][j] * LOG2_E - base * LOG2_E)/
// mutant: probabilities not normalised|s/ \* softmax\.normaliser;/;/
// mutant: y of hidden keys|s/sees && keep \? p/keep ? p/
// mutant: ds of hidden keys|s/= sees \? p \* /= true ? p * /
// mutant: dP not dropped|s/keep \? \(DROPS \? drop\.scale \* dp\[j\] : dp\[j\]\) : 0\.f/drop.scale * dp[j]/
// mutant: delta lost|s/p \* \(kept_dp - delta\)/p * kept_dp/
// mutant: dq, softmax past its end|s/min\(row, last_query\)/row/
// mutant: dk, softmax past its end|s/min\(row, args\.queries - 1\)/row/
// mutant: first head of a group|s/head < \(kv_head \+ 1\) \* group/head < kv_head * group + 1/
// mutant: dv without its scale|s/dv_factor = DROPS \? drop\.scale : 1\.f/dv_factor = 1.f/
