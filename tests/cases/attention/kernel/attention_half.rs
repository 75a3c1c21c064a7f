//! `kernels/attention_half.cu` against its formula in f64.

use candle_dropout::functional::AttentionPass;

use super::checks::*;
use super::form::{Form, drop_keys, far, features, layouts, masks, shapes};
use super::run::Kernels;
use crate::host::{Program, skip_without_compiler};

static PROGRAM: Program = Program::new("kernels/attention_half.cu");

const HALVES: Kernels = Kernels {
    program: &PROGRAM,
    head_sizes: &AttentionPass::HALF_HEAD_SIZES,
    launch: AttentionPass::launch_half,
    unit_logit: std::f64::consts::LOG2_E,
};

/// Runs `$test::<T>(&HALVES, ..)` for both halves.
macro_rules! for_each_half {
    ($test:ident($forms:expr)) => {{
        $test::<half::f16>(&HALVES, $forms);
        $test::<half::bf16>(&HALVES, $forms);
    }};
}

#[test]
fn forward_and_backward_equal_the_formula() {
    skip_without_compiler!();
    for_each_half!(equal_the_formula(&shapes(&[1, 32, 40, 64, 96, 128, 256])));
}

#[test]
fn features_equal_the_formula() {
    skip_without_compiler!();
    for_each_half!(equal_the_formula(&features()));
}

#[test]
fn tensors_may_lie_anywhere() {
    skip_without_compiler!();
    for_each_half!(equal_the_formula(&layouts()));
}

#[test]
fn windows_are_parts_of_the_whole_mask() {
    skip_without_compiler!();
    for_each_half!(equal_the_formula(&masks()));
}

#[test]
fn dropped_keys_are_as_if_hidden() {
    skip_without_compiler!();
    for_each_half!(equal_the_formula(&drop_keys(&[32, 64, 96, 128, 256])));
}

#[test]
fn scores_far_from_0_keep_their_digits() {
    skip_without_compiler!();
    for_each_half!(lose_no_digits_far_from_0(&far()));
}

#[test]
fn the_mask_is_that_of_the_law_in_every_bit() {
    skip_without_compiler!();
    let mut forms = vec![
        Form::new([100, 130, 64], 0.1),
        Form::with_heads([2, 2, 2], [33, 70, 40], 0.5),
        Form { drop_key: true, ..Form::with_heads([1, 2, 2], [33, 70, 40], 0.5) },
        Form::new([40, 60, 128], 0.3),
        Form::new([20, 40, 256], 0.3),
    ];
    forms.extend(masks().into_iter().filter(|form| form.heads == form.kv_heads));
    for_each_half!(draw_the_law(&forms));
}

#[test]
fn errors_are_no_larger_than_those_of_the_naive_formula() {
    skip_without_compiler!();
    let forms = [
        Form::with_heads([1, 2, 1], [90, 150, 64], 0.1).causal(),
        Form::new([70, 70, 128], 0.),
        Form { softcap: 3., ..Form::new([70, 100, 64], 0.1) },
    ];
    for_each_half!(err_no_more_than_the_naive_formula(&forms));
}

// mutant of kernels/attention_scores.cuh: threshold kept|s/draws << 16 : draws\) < /draws << 16 : draws) <= /
// mutant of kernels/attention_scores.cuh: halves borrow|s/\(draws \| HIGHEST\) - /draws - /
// mutant of kernels/attention_scores.cuh: highest bits ignored|s/\(~draws & threshold\) \| //
// mutant of kernels/attention_scores.cuh: shift lost|s/uint32_t\(key \+ shift\)/uint32_t(key)/
// mutant of kernels/attention_scores.cuh: mask row of head lost|s/first_mask_row \+ query/query/
// mutant of kernels/attention_scores.cuh: rows that see nothing|s/sees \? delta\[row\]/true ? delta[row]/
// mutant of kernels/attention_scores.cuh: reference and normaliser in one|s/-statistics\.reference\)\) \* statistics\.normaliser/-(statistics.reference - log2f(statistics.normaliser))))/
// mutant of kernels/attention_scores.cuh: probabilities not normalised|s/ \* statistics\.normaliser;/;/
// mutant of kernels/attention_scores.cuh: drops by product|s/\(keep \? kept_dp : -statistics\.delta\)/((keep ? 1.f : 0.f) * kept_dp - statistics.delta)/
// mutant of kernels/attention_scores.cuh: negative scale is plain|s/ && factor > 0\.f//
// mutant of kernels/attention_scores.cuh: other half of the column tiles|s/first == 0 \? draws\.word\[n % 4\] : draws\.word\[\(n \+ 2\) % 4\]/draws.word[n % 4]/
// mutant of kernels/attention_scores.cuh: draws of the first block of keys|s/if \(n % 4 == 0\) draws = /if (n == 0) draws = /
// mutant of kernels/attention_scores.cuh: dropped keys seen|s/if \(!mask\.keeps\(word, e\)\) s\[m\]/if (false) s[m]/
// mutant: forward and dq see dropped keys|s/if \(DROPS && args\.drop_key\) hide_dropped\(s, mask, query, key, 0\);//
// mutant: dk and dv see dropped keys|s/if \(DROPS && args\.drop_key\) hide_dropped\(s, mask, query, key, first\);//
// mutant: weights dropped as keys|s/if \(DROPS && args\.drop_key\)/if (DROPS)/
// mutant: sums not scaled down|s/sums\[m\]\[h\] \*= shrink;//
// mutant: no stand-in for -inf|s/reference\[m\]\[h\] == -INFINITY \? 0\.f : reference/reference/
// mutant: heads of keys|s/head \/ \(args\.heads \/ args\.kv_heads\)/head % args.kv_heads/
// mutant: queries that see nothing|s/const int seeing_begin = args\.seeing_begin\(0\)/const int seeing_begin = 0/
// mutant: keys that none sees|s/const int seen_begin = args\.visible_begin\(0\)/const int seen_begin = 0/
