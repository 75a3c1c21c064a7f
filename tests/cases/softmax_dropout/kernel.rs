//! `kernels/softmax_dropout.cu` against its formula in f64.

use candle_dropout::functional::{AttentionMask, ScoreArgs};

use super::SCALE;
use crate::host::*;

static KERNELS: Program = Program::new("kernels/softmax_dropout.cu");

/// Teams of 4, 8 and 32 lanes; a whole block a row; rows longer than the registers hold.
const SHAPES: &[[usize; 2]] = &[
    [1, 1],
    [5, 3],
    [70, 16],
    [9, 61],
    [130, 64],
    [11, 256],
    [10, 1000],
    [3, 1025],
    [3, 2048],
    [2, 8208],
    [2, 8195],
];

/// Scores, the shape of what is added to them or none, causal, start of the window.
type Attention = ([usize; 4], Option<&'static [usize]>, bool, [usize; 4]);

/// Every way to broadcast a mask; a causal one over more, fewer and as many keys as queries; parts of the
/// heads, of the queries, of the keys.
const ATTENTION: &[Attention] = &[
    ([2, 3, 4, 16], Some(&[4, 16]), false, [0; 4]),
    ([2, 3, 4, 16], Some(&[2, 1, 1, 16]), false, [1, 2, 3, 8]),
    ([2, 3, 4, 11], Some(&[1, 3, 4, 11]), false, [1, 2, 3, 5]),
    ([2, 3, 4, 16], Some(&[2, 1, 4, 1]), false, [0, 1, 0, 3]),
    ([2, 3, 4, 40], Some(&[2, 3, 4, 40]), false, [0, 0, 1, 0]),
    ([2, 3, 4, 13], Some(&[1]), false, [0, 0, 1, 0]),
    ([2, 3, 5, 16], None, true, [0, 1, 0, 0]),
    ([2, 3, 5, 13], None, true, [1, 0, 2, 8]),
    ([2, 2, 19, 8], None, true, [0; 4]),
    ([2, 2, 13, 5], None, true, [0, 1, 0, 3]),
    ([2, 2, 8, 8], None, true, [0, 0, 0, 16]),
    ([1, 2, 3, 8200], None, true, [0, 0, 2, 0]),
];

/// What is put where it must not matter, and where it must.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Poison {
    /// In the scores and gradients of masked keys, in the gradients of dropped ones.
    WhereHidden,
    /// A NaN among the scores of some rows: what is dropped is 0 all the same.
    InScores,
}

struct Form {
    dims: Vec<usize>,
    additive: Option<Vec<usize>>,
    causal: bool,
    offset: usize,
    mask: Mask,
    /// Keys are dropped, not weights.
    drop_key: bool,
    poison: Poison,
    what: String,
}

/// The index in a tensor of shape `small` of what element `i` of one of shape `dims` gets from it.
fn broadcast_index(mut i: usize, dims: &[usize], small: &[usize]) -> usize {
    let (mut index, mut stride) = (0, 1);
    for (at, dim) in dims.iter().enumerate().rev() {
        if let Some(&size) = (at + small.len()).checked_sub(dims.len()).map(|at| &small[at]) {
            index += if size == 1 { 0 } else { i % dim * stride };
            stride *= size;
        }
        i /= dim;
    }
    index
}

/// The inputs of a form.
struct Inputs<T> {
    scores: Vec<T>,
    additive: Option<Vec<T>>,
    dy: Vec<T>,
    /// Scaled and masked.
    t: Vec<f64>,
}

fn inputs<T: Element>(form: &Form) -> Inputs<T> {
    let Form { dims, mask, drop_key, poison: how, .. } = form;
    let [queries, keys] = [dims[dims.len() - 2], dims[dims.len() - 1]];
    let len = mask.keep.len();
    let (mut scores, mut dy): (Vec<T>, Vec<T>) = (random(1, len), random(2, len));
    let additive: Option<Vec<T>> = form.additive.as_ref().map(|small| {
        let mut additive: Vec<T> = random(3, small.iter().product());
        let masked = T::from_f64(f64::NEG_INFINITY);
        additive.iter_mut().step_by(5).for_each(|bias| *bias = masked);
        additive
    });
    let mut t = Vec::with_capacity(len);
    for i in 0..len {
        let (query, key) = (i / keys % queries, i % keys);
        if *how == Poison::InScores && i % (2 * keys) == keys / 2 {
            scores[i] = poison(0);
        }
        let unseen = form.causal && key + queries > query + keys;
        let hidden = unseen || (*drop_key && !mask.keep[i]);
        if hidden && *how == Poison::WhereHidden {
            scores[i] = poison(i);
        }
        let bias = additive.as_ref().map_or(0., |additive| {
            let small = form.additive.as_deref().unwrap_or(&[]);
            additive[broadcast_index(i, dims, small)].to_f64()
        });
        t.push(if hidden { f64::NEG_INFINITY } else { SCALE * scores[i].to_f64() + bias });
        if *how == Poison::WhereHidden && (t[i] == f64::NEG_INFINITY || !mask.keep[i]) {
            dy[i] = poison(i);
        }
    }
    Inputs { scores, additive, dy, t }
}

/// A result and the size of what each of its elements is the sum of.
#[derive(Default)]
struct Expected {
    values: Vec<f64>,
    terms: Vec<f64>,
}

/// `y`, and `dscores` for each of the scales of the gradient.
fn formula<T: Element>(
    Inputs { t, dy, .. }: &Inputs<T>,
    keep: &[bool],
    drop_scale: f64,
    keys: usize,
) -> [Expected; 3] {
    let [mut y, mut dscores, mut dt] = [(); 3].map(|()| Expected::default());
    for ((t, dy), keep) in t.chunks(keys).zip(dy.chunks(keys)).zip(keep.chunks(keys)) {
        let max = t.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let e: Vec<f64> =
            t.iter().map(|t| if *t == f64::NEG_INFINITY { 0. } else { (t - max).exp() }).collect();
        let sum: f64 = e.iter().sum();
        let p: Vec<f64> = e.iter().map(|e| if sum == 0. { 0. } else { e / sum }).collect();
        let dp: Vec<f64> = (dy.iter().zip(keep).zip(&p))
            .map(|((dy, keep), p)| if *keep && *p != 0. { dy.to_f64() * drop_scale } else { 0. })
            .collect();
        let dot: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
        let dot_terms: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp.abs()).sum();
        for ((p, dp), keep) in p.iter().zip(&dp).zip(keep) {
            let kept = if *keep { p * drop_scale } else { 0. };
            y.values.push(kept);
            y.terms.push(kept);
            for (gradient, grad_scale) in [(&mut dscores, SCALE), (&mut dt, 1.)] {
                let (value, terms) = (p * (dp - dot), p * (dp.abs() + dot_terms));
                gradient.values.push(grad_scale * value);
                gradient.terms.push(grad_scale * terms);
            }
        }
    }
    [y, dscores, dt]
}

fn equals_the_formula<T: Element>(forms: &[Form]) {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for (at, form) in forms.iter().enumerate() {
        let keys = form.dims[form.dims.len() - 1];
        let (len, rows) = (form.mask.keep.len(), form.mask.keep.len() / keys);
        let inputs = inputs::<T>(form);
        let attention_mask = match (form.causal, &form.additive, &inputs.additive) {
            (true, ..) => AttentionMask::Causal,
            (_, Some(dims), Some(additive)) => AttentionMask::Additive(tensor(additive, dims)),
            _ => AttentionMask::None,
        };
        let args = ScoreArgs::new("test", &form.dims, SCALE, &attention_mask).unwrap();
        let (args, mask, scale) = match form.drop_key {
            true => (args.dropping_keys(), form.mask.args.unscaled(), 1.),
            false => (args, form.mask.args, form.mask.scale),
        };
        let [y, dscores, dt] = formula(&inputs, &form.mask.keep, scale, keys);
        let passes =
            [("fwd", args, y), ("bwd", args, dscores), ("bwd", args.with_unit_gradient(), dt)];
        for (pass, args, result) in passes {
            // A NaN among the scores makes the gradient of its row one; at p = 1 no backward pass is launched.
            if pass == "bwd" && form.poison == Poison::InScores {
                continue;
            }
            let launch = ScoreArgs::launch(rows, keys, MULTIPROCESSORS[at % 2]);
            let case = case::<T>(&format!("softmax_dropout_{pass}"), launch)
                .input(&inputs.scores)
                .misaligned_by(form.offset * size_of::<T>())
                .optional(&inputs.additive);
            let case = if pass == "bwd" { case.input(&inputs.dy) } else { case };
            cases.push(
                case.output::<T>(len)
                    .value(rows as u64)
                    .value(keys as u64)
                    .by_value(&args)
                    .by_value(&mask),
            );
            expected.push((result, format!("{pass} {}, {:?}", form.what, form.poison)));
        }
    }
    for (outputs, (Expected { values, terms }, what)) in
        KERNELS.run(&cases).unwrap().iter().zip(expected)
    {
        assert_close(&outputs.get::<T>(0), &values, &terms, &what);
    }
}

#[test]
fn forward_and_backward_equal_the_formula() {
    skip_without_compiler!();
    let mut forms = Vec::new();
    for (at, &[rows, keys]) in SHAPES.iter().enumerate() {
        let variants = [
            (None::<Vec<usize>>, false, 0, [0, 0], 0.2),
            (Some(vec![rows, keys]), false, 0, [0, 3], 0.2),
            (Some(vec![keys]), false, 1, [0, 0], 0.2),
            (Some(vec![rows, 1]), false, 0, [4, 8], 0.2),
            (None, true, 0, [0, 0], 0.2),
            (Some(vec![1, keys]), false, 0, [0, 0], 0.),
            (None, true, 0, [0, 0], 1.),
        ];
        // Long rows take their time.
        let every = if rows * keys > 5000 { 2 } else { 1 };
        for (additive, causal, offset, start, drop_p) in
            variants.into_iter().skip(at % every).step_by(every)
        {
            let dims = vec![rows, keys];
            let what = format!(
                "{dims:?}, additive {additive:?}, causal {causal}, start {start:?}, p {drop_p}"
            );
            let mask = Mask::from_start(drop_p, &dims, &start);
            let poison = Poison::WhereHidden;
            let drop_key = false;
            forms.push(Form { dims, additive, causal, offset, mask, drop_key, poison, what });
        }
    }
    for_each_dtype!(equals_the_formula(&forms));
}

#[test]
fn heads_and_queries_are_those_of_the_attention() {
    skip_without_compiler!();
    let mut forms = Vec::new();
    for (at, &(dims, additive, causal, start)) in ATTENTION.iter().enumerate() {
        let full: Vec<usize> = (0..4).map(|d| start[d] + dims[d] + d % 2).collect();
        for drop_p in [0.5, [0., 1.][at % 2]] {
            forms.push(Form {
                dims: dims.to_vec(),
                additive: additive.map(<[usize]>::to_vec),
                causal,
                offset: 0,
                mask: Mask::window(drop_p, [&dims, &full, &start]),
                drop_key: false,
                poison: Poison::WhereHidden,
                what: format!(
                    "{dims:?} of {full:?}, additive {additive:?}, causal {causal}, start {start:?}, p {drop_p}"
                ),
            });
        }
    }
    for_each_dtype!(equals_the_formula(&forms));
}

#[test]
fn windows_are_parts_of_the_whole_mask() {
    skip_without_compiler!();
    let form = |&window: &[&'static [usize]; 3]| Form {
        dims: window[0].to_vec(),
        additive: None,
        causal: false,
        offset: 0,
        mask: Mask::window(0.5, window),
        drop_key: false,
        poison: Poison::WhereHidden,
        what: format!("{window:?}"),
    };
    let forms: Vec<Form> = WINDOWS.iter().map(form).collect();
    for_each_dtype!(equals_the_formula(&forms));
}

#[test]
fn what_is_dropped_is_0_even_in_a_row_of_nans() {
    skip_without_compiler!();
    let mut forms = Vec::new();
    for dims in [[3, 16], [4, 61], [2, 8200]] {
        for drop_p in [0.5, 1.] {
            forms.push(Form {
                dims: dims.to_vec(),
                additive: None,
                causal: false,
                offset: 0,
                mask: Mask::from_start(drop_p, &dims, &[0, 0]),
                drop_key: false,
                poison: Poison::InScores,
                what: format!("{dims:?}, p {drop_p}"),
            });
        }
    }
    for_each_dtype!(equals_the_formula(&forms));
}

#[test]
fn dropped_keys_are_as_if_masked() {
    skip_without_compiler!();
    let mut forms = Vec::new();
    // Whole vectors in registers and read again, elements, rows of which every key is dropped; with what else masks.
    for (dims, start, additive, causal, drop_p) in [
        (vec![70, 16], vec![0, 0], None, false, 0.2),
        (vec![70, 3], vec![0, 0], None, true, 0.7),
        (vec![9, 61], vec![0, 3], None, false, 0.5),
        (vec![11, 256], vec![0, 8], Some(vec![256]), false, 0.3),
        (vec![3, 2048], vec![0, 0], None, true, 0.2),
        (vec![2, 8208], vec![0, 0], Some(vec![2, 1]), false, 0.2),
        (vec![2, 8208], vec![0, 5], None, true, 0.5),
        (vec![2, 3, 4, 16], vec![1, 2, 3, 8], Some(vec![2, 1, 1, 16]), false, 0.4),
        (vec![2, 3, 4, 13], vec![0, 0, 1, 0], None, true, 0.4),
        (vec![5, 40], vec![0, 0], None, false, 0.),
        (vec![5, 40], vec![0, 0], None, false, 1.),
    ] {
        for poison in [Poison::WhereHidden, Poison::InScores] {
            forms.push(Form {
                mask: Mask::from_start(drop_p, &dims, &start),
                what: format!("{dims:?} from {start:?}, causal {causal}, p {drop_p}, keys dropped"),
                dims: dims.clone(),
                additive: additive.clone(),
                causal,
                offset: 0,
                drop_key: true,
                poison,
            });
        }
    }
    for_each_dtype!(equals_the_formula(&forms));
}

#[test]
fn what_the_gradients_of_a_row_have_in_common_does_not_count() {
    skip_without_compiler!();
    for keys in [3, 61, 256, 1000, 8200] {
        let scores: Vec<f32> = random(1, keys);
        // A step of f32 at 4096 is 2^-11: these have the same differences with it and without.
        let near: Vec<f32> =
            random::<f32>(2, keys).iter().map(|x| (x * 64.).round() / 64.).collect();
        let far: Vec<f32> = near.iter().map(|x| x + 4096.).collect();
        let mask = Mask::from_start(0., &[1, keys], &[0, 0]);
        let args = ScoreArgs::new("test", &[1, keys], SCALE, &AttentionMask::None).unwrap();
        let [near, far] = [near, far].map(|dy| -> Vec<f32> {
            let case = case::<f32>("softmax_dropout_bwd", ScoreArgs::launch(1, keys, 1))
                .input(&scores)
                .null()
                .input(&dy)
                .output::<f32>(keys)
                .value(1u64)
                .value(keys as u64)
                .by_value(&args)
                .by_value(&mask.args);
            KERNELS.run_one(case).unwrap().get(0)
        });
        let largest = near.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        for (near, far) in near.iter().zip(&far) {
            assert!((near - far).abs() <= 1e-6 * largest, "{keys} keys: {near} and {far}");
        }
    }
}

#[test]
fn the_mask_is_that_of_an_independent_implementation() {
    skip_without_compiler!();
    assert_keeps_the_vectors(&KERNELS, |mask, keys| {
        let args = ScoreArgs::new("test", &[1, keys], SCALE, &AttentionMask::None).unwrap();
        case::<f32>("softmax_dropout_fwd", ScoreArgs::launch(1, keys, 1))
            .input(&vec![1f32; keys])
            .null()
            .output::<f32>(keys)
            .value(1u64)
            .value(keys as u64)
            .by_value(&args)
            .by_value(mask)
    });
}

#[test]
fn the_mask_of_keys_is_that_of_an_independent_implementation() {
    skip_without_compiler!();
    assert_keeps_the_vectors(&KERNELS, |mask, keys| {
        let args = ScoreArgs::new("test", &[1, keys], SCALE, &AttentionMask::None).unwrap();
        case::<f32>("softmax_dropout_fwd", ScoreArgs::launch(1, keys, 1))
            .input(&vec![1f32; keys])
            .null()
            .output::<f32>(keys)
            .value(1u64)
            .value(keys as u64)
            .by_value(&args.dropping_keys())
            .by_value(&mask.unscaled())
    });
}

// mutant: dropped keys seen|s/if \(!drops_keys\) return;/return;/
// mutant: weights dropped as keys|s/if \(!drops_keys\) return;//
// mutant: dropped keys seen when read again|s/^        row\.hide_dropped\(key, t\[i\]\);//
// mutant: keys drop by product|s/keeps\(drop, draws\[j\]\) \? t\[j\] : -INFINITY/t[j] + (keeps(drop, draws[j]) ? 0.f : -INFINITY)/
// mutant: queries of all heads|s/row % queries/row/
// mutant: gradient scale|s/float\(args\.grad_scale\)/float(args.scale)/
// mutant: drops by product|s/keeps\(drop, draws\[j\]\) \? e\[j\] \* scale : 0\.f/e[j] * (keeps(drop, draws[j]) ? scale : 0.f)/
// mutant: dP drops by product|s/keeps\(drop, draws\[j\]\) \? dp\[i\]\[j\] \* drop\.scale : 0\.f/dp[i][j] * (keeps(drop, draws[j]) ? drop.scale : 0.f)/
// mutant: masked keys pass on|s/e\[j\] == 0\.f \? 0\.f : e\[j\] \* dp/e[j] * dp/
// mutant: second mean lost|s/const float rest = .*/const float rest = 0.f;/
// mutant: second mean of masked keys|s/thread_rest \+= e\[j\] == 0\.f \? 0\.f : /thread_rest += /
