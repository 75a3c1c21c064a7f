//! In f32 and f64 the weights are candle's, bit for bit but for the sign of a zero.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::training::{AdamW, Optimizer, ParamGroup, ParamsAdamW};
use cases::{bits, random};
use proptest::prelude::*;

use super::*;

/// Shapes with one element, with few, and with more than a thread takes at a time.
fn shape() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        prop::collection::vec(1usize..7, 0..4),
        (16_380usize..16_390).prop_map(|len| vec![len]),
        (1usize..5, 7000usize..9000).prop_map(|(rows, cols)| vec![rows, cols]),
    ]
}

fn any_params() -> impl Strategy<Value = ParamsAdamW> {
    let rates = (1e-5f64..1., 0f64..0.999, 0f64..0.99999, -12f64..0., 0f64..0.3);
    rates.prop_map(|(lr, beta1, beta2, eps, weight_decay)| ParamsAdamW {
        lr,
        beta1,
        beta2,
        eps: 10f64.powf(eps),
        weight_decay,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_hundred_steps_are_candles(
        shapes in prop::collection::vec(shape(), 1..4),
        params in any_params(),
        // Which variables have a gradient, step after step; how large gradients are, and the rate.
        has_grads in prop::collection::vec(prop::collection::vec(prop::bool::weighted(0.8), 4), 100),
        magnitude in -18i32..6,
        double in any::<bool>(),
        seed in any::<u32>(),
    ) {
        let dtype = if double { DType::F64 } else { DType::F32 };
        let ours = vars(&shapes, dtype, u64::from(seed)).unwrap();
        let theirs = copies(&ours).unwrap();
        let mut adamw = AdamW::new(ours.clone(), params.clone()).unwrap();
        let mut candle = candle_nn::AdamW::new(theirs.clone(), params.clone()).unwrap();
        for (at, has_grad) in has_grads.iter().enumerate() {
            let scale = 10f64.powi(magnitude);
            let [mut of_ours, mut of_theirs] = [GradStore::default(), GradStore::default()];
            for (i, has_grad) in has_grad.iter().enumerate().take(ours.len()) {
                if *has_grad {
                    let grad = random(&shapes[i], dtype, u64::from(seed) + (1000 * at + i) as u64);
                    let grad = (grad.unwrap() * scale).unwrap();
                    of_ours.insert(&ours[i], grad.clone());
                    of_theirs.insert(&theirs[i], grad);
                }
            }
            if at % 10 == 9 {
                let lr = params.lr / (at + 1) as f64;
                adamw.set_learning_rate(lr);
                candle.set_learning_rate(lr);
            }
            adamw.step(&of_ours).unwrap();
            candle.step(&of_theirs).unwrap();
            if at % 10 == 0 || at >= 90 {
                prop_assert_eq!(all_bits(&ours).unwrap(), all_bits(&theirs).unwrap(), "step {}", at);
            }
        }
    }
}

#[test]
fn gradients_may_be_strided_broadcast_or_views() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let ours = vars(&[vec![4, 6], vec![4, 6], vec![4, 6], vec![4, 6]], dtype, 1)?;
        let theirs = copies(&ours)?;
        let x = random(&[6, 4], dtype, 5)?;
        let views = [
            x.t()?,
            random(&[6], dtype, 6)?.broadcast_as((4, 6))?,
            Tensor::ones((), dtype, &Device::Cpu)?.broadcast_as((4, 6))?,
            random(&[9, 6], dtype, 7)?.narrow(0, 3, 4)?,
        ];
        let mut adamw = AdamW::new_lr(ours.clone(), 0.1)?;
        let mut candle = candle_nn::AdamW::new_lr(theirs.clone(), 0.1)?;
        for _ in 0..3 {
            adamw.step(&store(&ours, &views))?;
            candle.step(&store(&theirs, &views))?;
        }
        assert_eq!(all_bits(&ours)?, all_bits(&theirs)?);
    }
    Ok(())
}

#[test]
fn a_gradient_may_be_a_variable() -> Result<()> {
    // Of the first the second, of the second itself: what they were before the step.
    let ours = vars(&[vec![5], vec![5]], DType::F32, 1)?;
    let theirs = copies(&ours)?;
    let before = copies(&ours)?;
    let mut adamw = AdamW::new_lr(ours.clone(), 0.1)?.with_clip_norm(1.)?;
    let mut same = AdamW::new_lr(theirs.clone(), 0.1)?.with_clip_norm(1.)?;
    let grads = [ours[1].as_detached_tensor(), ours[1].as_tensor().clone()];
    adamw.step(&store(&ours, &grads))?;
    let grads = [before[1].as_detached_tensor(), before[1].as_detached_tensor()];
    same.step(&store(&theirs, &grads))?;
    assert_eq!(all_bits(&ours)?, all_bits(&theirs)?);
    // And a variable that comes before the one whose gradient it is.
    let grads = [ours[0].as_detached_tensor(), ours[0].as_detached_tensor()];
    let before = copies(&ours)?;
    adamw.step(&store(&ours, &grads))?;
    let grads = [before[0].as_detached_tensor(), before[0].as_detached_tensor()];
    same.step(&store(&theirs, &grads))?;
    assert_eq!(all_bits(&ours)?, all_bits(&theirs)?);
    Ok(())
}

#[test]
fn gradients_that_are_no_numbers_go_where_candles_go() -> Result<()> {
    let ours = vars(&[vec![4]], DType::F32, 1)?;
    let theirs = copies(&ours)?;
    let mut adamw = AdamW::new_lr(ours.clone(), 0.1)?;
    let mut candle = candle_nn::AdamW::new_lr(theirs.clone(), 0.1)?;
    for _ in 0..2 {
        let grads = [tensor(&[f32::NAN, f32::INFINITY, -1., f32::NEG_INFINITY])?];
        adamw.step(&store(&ours, &grads))?;
        candle.step(&store(&theirs, &grads))?;
    }
    let [ours, theirs] = [ours[0].to_vec1::<f32>()?, theirs[0].to_vec1::<f32>()?];
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "{ours} and {theirs}");
    }
    assert_eq!(ours.iter().filter(|x| x.is_nan()).count(), 3);
    Ok(())
}

#[test]
fn groups_have_a_decay_and_a_rate_of_their_own() -> Result<()> {
    let ours = vars(&[vec![3, 5], vec![7], vec![20_000]], DType::F32, 1)?;
    let theirs = copies(&ours)?;
    let params = ParamsAdamW { lr: 0.1, weight_decay: 0.3, ..Default::default() };
    let group = |at: usize, weight_decay, lr_scale| ParamGroup {
        vars: vec![(format!("v{at}"), ours[at].clone())],
        weight_decay,
        lr_scale,
    };
    let groups = vec![group(0, None, 1.), group(1, Some(0.), 1.), group(2, Some(0.05), 0.25)];
    let mut adamw = AdamW::from_groups(groups, params.clone())?;
    let of = |at: usize, lr, weight_decay| {
        let params = ParamsAdamW { lr, weight_decay, ..params.clone() };
        candle_nn::AdamW::new(vec![theirs[at].clone()], params)
    };
    let mut candles = [of(0, 0.1, 0.3)?, of(1, 0.1, 0.)?, of(2, 0.025, 0.05)?];
    for step in 0..10 {
        let grads = gradients(&ours, step)?;
        adamw.step(&store(&ours, &grads))?;
        for candle in &mut candles {
            candle.step(&store(&theirs, &grads))?;
        }
    }
    assert_eq!(all_bits(&ours)?, all_bits(&theirs)?);
    Ok(())
}

#[test]
fn a_variable_without_elements_is_no_obstacle() -> Result<()> {
    let vars = vars(&[vec![0], vec![2], vec![3, 0]], DType::F32, 1)?;
    let mut adamw = AdamW::new_lr(vars.clone(), 0.1)?.with_clip_norm(1.)?;
    let before = all_bits(&vars)?;
    adamw.step(&store(&vars, &gradients(&vars, 1)?))?;
    let after = all_bits(&vars)?;
    assert_eq!([&after[0], &after[2]], [&before[0], &before[2]]);
    assert_ne!(after[1], before[1]);
    Ok(())
}

#[test]
fn it_stands_in_for_candles() -> Result<()> {
    /// What a user of candle wrote.
    fn train<O: Optimizer<Config = ParamsAdamW>>(var: &Var) -> Result<Vec<u64>> {
        let mut optimizer = O::new(vec![var.clone()], ParamsAdamW::default())?;
        optimizer.set_learning_rate(0.25);
        assert_eq!(optimizer.learning_rate(), 0.25);
        for _ in 0..5 {
            optimizer.backward_step(&var.sqr()?.sum_all()?)?;
        }
        bits(var)
    }
    let of = || Var::new(&[1f32, -2., 3.], &Device::Cpu);
    assert_eq!(train::<AdamW>(&of()?)?, train::<candle_nn::AdamW>(&of()?)?);

    let ids = Var::new(&[1u32, 2], &Device::Cpu)?; // no float: passed over
    let mut adamw = AdamW::new_lr(vec![ids.clone(), of()?], 0.5)?;
    assert_eq!(adamw.params().lr, 0.5);
    adamw.set_params(ParamsAdamW { lr: 2., ..Default::default() });
    assert_eq!(adamw.learning_rate(), 2.);
    adamw.step(&GradStore::default())?;
    assert_eq!(ids.to_vec1::<u32>()?, [1, 2]);
    assert!(AdamW::empty(ParamsAdamW::default())?.state()?.len() == 1);
    Ok(())
}

#[test]
fn no_result_depends_on_the_number_of_threads() -> Result<()> {
    let run = |threads: usize| -> Result<_> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| {
            let vars = vars(&[vec![300, 401], vec![3], vec![70_001]], DType::F32, 1)?;
            let mut adamw = AdamW::new_lr(vars.clone(), 0.1)?.with_clip_norm(0.5)?;
            let mut norms = Vec::new();
            for step in 0..4 {
                adamw.step(&store(&vars, &gradients(&vars, step)?))?;
                norms.push(adamw.last_grad_norm()?.map(f64::to_bits));
            }
            Ok((all_bits(&vars)?, norms))
        })
    };
    let alone = run(1)?;
    for threads in [2, 3, 7] {
        assert_eq!(run(threads)?, alone, "{threads} threads");
    }
    Ok(())
}
