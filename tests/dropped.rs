//! What is dropped vanishes, and what attention does not see too, whatever was there; and an op in one piece
//! equals it in several.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{
    AttentionMask, StochasticDepth, drop_path_add, dropout, dropout_add, softmax_dropout,
};
use candle_dropout::{DropMask, compose};
use cases::runner::{gradient, same_bits};
use cases::softmax_dropout::SCALE;
use cases::{DTYPES, bits, largest, mask, random};

/// NaN, both infinities and -0 where `keep` is 0, and the elements of `x` elsewhere.
fn poisoned(x: &Tensor, keep: &Tensor) -> Result<Tensor> {
    let poison = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.];
    let poison: Vec<_> = (0..x.elem_count()).map(|i| poison[i % 4]).collect();
    let poison = Tensor::from_vec(poison, x.dims(), x.device())?.to_dtype(x.dtype())?;
    keep.where_cond(x, &poison)
}

/// A fact of the passes and of what takes their place on devices without them.
fn as_passes_and_composed(fact: impl Fn() -> Result<()>) -> Result<()> {
    fact()?;
    let _composed = compose();
    fact()
}

#[test]
fn dropped_infinities_and_nans_vanish_from_dropout() -> Result<()> {
    as_passes_and_composed(|| {
        for (dtype, drop_p) in DTYPES.into_iter().flat_map(|dtype| [(dtype, 0.4), (dtype, 1.)]) {
            let (drop, dims) = (mask(drop_p), [13, 41]);
            let keep = drop.to_tensor(&dims, &Device::Cpu)?;
            let (x, dy) = (random(&dims, dtype, 1)?, random(&dims, dtype, 2)?);
            let bad = Var::from_tensor(&poisoned(&x, &keep)?)?;
            let (y, clean) = (dropout(&bad, &drop)?, dropout(&x, &drop)?);
            same_bits(&y, &clean, "output")?;
            let dropped = bits(&y)?.into_iter().zip(bits(&keep)?).filter(|(_, keep)| *keep == 0);
            assert!(dropped.map(|(y, _)| y).all(|y| y == 0), "a dropped element is +0");
            let zeros = keep.where_cond(&dy, &dy.zeros_like()?)?;
            let dx = gradient(&y, &poisoned(&dy, &keep)?, &bad)?;
            same_bits(&dx, &gradient(&y, &zeros, &bad)?, "gradient")?;
        }
        Ok(())
    })
}

#[test]
fn dropped_infinities_and_nans_leave_the_bare_residual() -> Result<()> {
    as_passes_and_composed(|| {
        for (dtype, drop_p) in DTYPES.into_iter().flat_map(|dtype| [(dtype, 0.4), (dtype, 1.)]) {
            let (drop, dims) = (mask(drop_p), [13, 41]);
            let keep = drop.to_tensor(&dims, &Device::Cpu)?;
            let (x, dy) = (random(&dims, dtype, 1)?, random(&dims, dtype, 2)?);
            // A residual with every kind of value, of which the dropped elements keep each bit.
            let residual = poisoned(&random(&dims, dtype, 3)?, &random(&dims, dtype, 4)?.gt(0.)?)?;
            let bias = Var::from_tensor(&random(&[41], dtype, 5)?)?;
            let bad = Var::from_tensor(&poisoned(&x, &keep)?)?;
            let zeros = keep.where_cond(&dy, &dy.zeros_like()?)?;
            for bias in [None, Some(&bias)] {
                let biased = bias.map(|bias| bias.as_tensor());
                let y = dropout_add(&bad, &residual, biased, &drop)?;
                same_bits(&y, &dropout_add(&x, &residual, biased, &drop)?, "output")?;
                let dropped = bits(&y)?.into_iter().zip(bits(&residual)?).zip(bits(&keep)?);
                assert!(
                    dropped.filter(|(_, keep)| *keep == 0).all(|((y, residual), _)| y == residual)
                );
                for var in [Some(&bad), bias].into_iter().flatten() {
                    let grad = gradient(&y, &poisoned(&dy, &keep)?, var)?;
                    same_bits(&grad, &gradient(&y, &zeros, var)?, "gradient")?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn dropped_probabilities_are_zero_even_in_a_row_of_nan() -> Result<()> {
    as_passes_and_composed(|| {
        for dtype in DTYPES {
            let (drop, dims) = (mask(0.4), [13, 41]);
            let keep = drop.to_tensor(&dims, &Device::Cpu)?;
            let scores = Var::from_tensor(&random(&dims, dtype, 1)?)?;
            let y = softmax_dropout(
                &(scores.as_tensor() * f64::NAN)?,
                1.,
                &AttentionMask::None,
                &drop,
            )?;
            let y = y.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
            for (y, keep) in y.iter().zip(bits(&keep)?) {
                assert!(if keep == 1 { y.is_nan() } else { y.to_bits() == 0 });
            }
            let (y, dy) = (
                softmax_dropout(&scores, 1., &AttentionMask::None, &drop)?,
                random(&dims, dtype, 2)?,
            );
            let zeros = keep.where_cond(&dy, &dy.zeros_like()?)?;
            let dscores = gradient(&y, &poisoned(&dy, &keep)?, &scores)?;
            same_bits(&dscores, &gradient(&y, &zeros, &scores)?, "gradient")?;
        }
        Ok(())
    })
}

#[test]
fn a_dropped_branch_leaves_the_bare_residual() -> Result<()> {
    for dtype in DTYPES {
        let (drop, dims) = (mask(0.4), [13, 41]);
        let keep = drop.to_tensor((1, 13), &Device::Cpu)?.t()?.broadcast_as(&dims)?.contiguous()?;
        let (x, dy) = (random(&dims, dtype, 1)?, random(&dims, dtype, 2)?);
        let residual = poisoned(&random(&dims, dtype, 3)?, &random(&dims, dtype, 4)?.gt(0.)?)?;
        let bad = Var::from_tensor(&poisoned(&x, &keep)?)?;
        let y = drop_path_add(&bad, &residual, StochasticDepth::Row, &drop)?;
        same_bits(&y, &drop_path_add(&x, &residual, StochasticDepth::Row, &drop)?, "output")?;
        let dropped = bits(&y)?.into_iter().zip(bits(&residual)?).zip(bits(&keep)?);
        assert!(dropped.filter(|(_, keep)| *keep == 0).all(|((y, residual), _)| y == residual));
        let zeros = keep.where_cond(&dy, &dy.zeros_like()?)?;
        let dx = gradient(&y, &poisoned(&dy, &keep)?, &bad)?;
        same_bits(&dx, &gradient(&y, &zeros, &bad)?, "gradient")?;
    }
    Ok(())
}

#[test]
fn rows_of_which_every_key_is_masked_give_zeros_and_zero_gradients() -> Result<()> {
    for (dtype, drop_p) in DTYPES.into_iter().flat_map(|dtype| [(dtype, 0.), (dtype, 0.4)]) {
        let scores = Var::from_tensor(&random(&[2, 5, 3], dtype, 1)?)?;
        // Queries 1 and 2 see nothing.
        let visible =
            Tensor::new(&[0f32, f32::NEG_INFINITY, f32::NEG_INFINITY, 0., 0.], &Device::Cpu)?;
        let additive = Var::from_tensor(&visible.reshape((5, 1))?.to_dtype(dtype)?)?;
        let blind_queries = [
            (AttentionMask::Additive(additive.as_tensor().clone()), [1, 2]),
            // Five queries and three keys: the first two come before every key.
            (AttentionMask::Causal, [0, 1]),
        ];
        for (mask_kind, blind) in blind_queries {
            let y = softmax_dropout(&scores, SCALE, &mask_kind, &mask(drop_p))?;
            let grads = (&y * random(&[2, 5, 3], dtype, 2)?)?.backward()?;
            let dscores = grads.get(&scores).unwrap();
            for query in blind {
                for x in [&y, dscores] {
                    let row = x.narrow(1, query, 1)?.to_dtype(DType::F64)?;
                    assert_eq!(largest(&row)?, 0., "{mask_kind:?}");
                }
            }
            assert!(largest(&dscores.to_dtype(DType::F64)?)?.is_finite());
            assert!(largest(&y.narrow(1, 3, 2)?.to_dtype(DType::F64)?)? > 0.);
            if let Some(dadditive) = grads.get(&additive) {
                assert!(largest(&dadditive.to_dtype(DType::F64)?)?.is_finite());
            }
        }
    }
    Ok(())
}

#[test]
fn a_key_of_probability_0_passes_nothing_on_whatever_arrives_there() -> Result<()> {
    let scores = Var::new(&[[1f32, 2., 3.], [4., 5., 6.], [7., 8., 9.]], &Device::Cpu)?;
    let poison = [[0.5f32, f32::INFINITY, f32::NAN], [1., -2., f32::NEG_INFINITY], [1., 2., 3.]];
    let clean = [[0.5f32, 0., 0.], [1., -2., 0.], [1., 2., 3.]];
    let blind = Tensor::full(f32::NEG_INFINITY, (3, 3), &Device::Cpu)?;
    let gradient = |attention: &AttentionMask, dy: [[f32; 3]; 3]| -> Result<Vec<Vec<f32>>> {
        let y = softmax_dropout(&scores, 0.7, attention, &mask(0.))?;
        let loss = (y * Tensor::new(&dy, &Device::Cpu)?)?;
        let grads = loss.backward()?;
        grads.get(&scores).expect("a gradient").to_vec2()
    };
    let causal = gradient(&AttentionMask::Causal, clean)?;
    assert_eq!(gradient(&AttentionMask::Causal, poison)?, causal);
    let zeros = vec![vec![0.; 3]; 3];
    assert_eq!(gradient(&AttentionMask::Additive(blind), poison)?, zeros);
    Ok(())
}

#[test]
fn at_p_1_even_nan_scores_get_zero_gradients() -> Result<()> {
    let scores = Var::new(&[[f32::NAN, 1., 2.], [f32::INFINITY, 0., 1.]], &Device::Cpu)?;
    let additive = Var::new(&[[f32::NAN, 0., f32::NEG_INFINITY]], &Device::Cpu)?;
    for attention in [AttentionMask::None, AttentionMask::Additive(additive.as_tensor().clone())] {
        let y = softmax_dropout(&scores, 1., &attention, &mask(1.))?;
        assert_eq!(y.to_vec2::<f32>()?, [[0.; 3]; 2]);
        let grads = y.backward()?;
        assert_eq!(grads.get(&scores).expect("a gradient").to_vec2::<f32>()?, [[0.; 3]; 2]);
        if let AttentionMask::Additive(_) = attention {
            assert_eq!(grads.get(&additive).expect("a gradient").to_vec2::<f32>()?, [[0.; 3]]);
        }
    }
    Ok(())
}

// ---- fused and unfused ----

#[test]
fn dropout_add_is_residual_plus_dropout_bit_for_bit() -> Result<()> {
    let (x, residual) = (random(&[37, 1031], DType::F32, 1)?, random(&[37, 1031], DType::F32, 2)?);
    let bias = random(&[1031], DType::F32, 3)?;
    for drop_p in [0., 0.1, 0.5, 1.] {
        let drop = mask(drop_p);
        let fused = dropout_add(&x, &residual, None, &drop)?;
        same_bits(&fused, &(&residual + dropout(&x, &drop)?)?, "output")?;
        let fused = dropout_add(&x, &residual, Some(&bias), &drop)?;
        let unfused = (&residual + dropout(&x.broadcast_add(&bias)?, &drop)?)?;
        same_bits(&fused, &unfused, "biased output")?;
    }
    Ok(())
}

#[test]
fn softmax_dropout_draws_the_mask_of_dropout() -> Result<()> {
    for dtype in DTYPES {
        let scores = random(&[2, 3, 37, 41], dtype, 1)?;
        let drop = mask(0.4);
        let dropped = dropout(&scores.ones_like()?, &drop)?.eq(0.)?;
        let y = softmax_dropout(&scores, SCALE, &AttentionMask::None, &drop)?;
        same_bits(&y.eq(0.)?, &dropped, "mask")?;
    }
    Ok(())
}

#[test]
fn nothing_to_drop_means_x_itself() -> Result<()> {
    let x = random(&[3, 5], DType::F32, 1)?;
    assert_eq!(dropout(&x, &DropMask::none())?.id(), x.id());
    assert_eq!(dropout(&x, &mask(0.))?.id(), x.id());
    Ok(())
}
