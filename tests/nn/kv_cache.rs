//! Caches hold what candle's hold, and pass on the gradient of what was appended last.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::nn::kv_cache as ours;
use candle_nn::kv_cache as candles;
use cases::bits;

/// Heads of 2 by 3 with `positions` along dimension `dim`, and no number twice in a test.
fn numbered(positions: usize, dim: usize, from: usize) -> Result<Tensor> {
    let count = 2 * 3 * positions;
    let x: Vec<f32> = (from..from + count).map(|at| at as f32 + 1.).collect();
    Tensor::from_vec(x, (1, 2, positions, 3), &Device::Cpu)?.transpose(2, dim)?.contiguous()
}

/// How many positions each call appends: into a cache of 4, below, up to, over and far over its end.
const CALLS: [&[usize]; 5] =
    [&[1, 2, 1, 1, 3], &[4, 1], &[3, 3, 3, 2, 1], &[9, 2, 1], &[2, 4, 5, 1]];

/// Runs calls of a cache of ours and one of candle's side by side; every call of ours is given a variable.
fn side_by_side(
    dim: usize,
    mut ours: impl FnMut(&Tensor, &Tensor) -> Result<Vec<Tensor>>,
    mut candles: impl FnMut(&Tensor, &Tensor) -> Result<Vec<Tensor>>,
    calls: &[usize],
    tracked: impl Fn(usize) -> bool,
) -> Result<()> {
    let mut from = 0;
    for (call, positions) in calls.iter().enumerate() {
        let k = numbered(*positions, dim, from)?;
        let v = numbered(*positions, dim, from + 1000)?;
        from += k.elem_count();
        let expected = candles(&k, &v)?;
        let vars = [Var::from_tensor(&k)?, Var::from_tensor(&v)?];
        let got = match tracked(call) {
            true => ours(&vars[0], &vars[1])?,
            false => ours(&k, &v)?,
        };
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(&expected) {
            assert_eq!(got.dims(), expected.dims(), "call {call} of {calls:?}");
            assert_eq!(bits(got)?, bits(expected)?, "call {call} of {calls:?}");
            assert_eq!(got.track_op(), tracked(call), "call {call} of {calls:?}");
        }
        if !tracked(call) {
            continue;
        }
        // The gradient of the sum of squares is twice the value, for each number that is still there.
        let squares = got.iter().map(|x| x.sqr()?.sum_all()).collect::<Result<Vec<_>>>()?;
        let grads = Tensor::stack(&squares, 0)?.sum_all()?.backward()?;
        for var in &vars {
            let grad = grads.get(var).expect("a gradient").flatten_all()?.to_vec1::<f32>()?;
            assert_eq!(grad, (var.as_tensor() * 2.)?.flatten_all()?.to_vec1::<f32>()?);
        }
    }
    Ok(())
}

#[test]
fn caches_hold_what_candles_hold_and_pass_gradients_on() -> Result<()> {
    for calls in CALLS {
        for tracked in [|_| true, |_| false, |call: usize| call.is_multiple_of(2)] {
            for dim in [1, 2] {
                let mut cache = ours::KvCache::new(dim, 4);
                let mut theirs = candles::KvCache::new(dim, 4);
                side_by_side(
                    dim,
                    |k, v| {
                        let (k, v) = cache.append(k, v)?;
                        assert_eq!(bits(&k)?, bits(&cache.k()?.expect("keys"))?);
                        assert_eq!(cache.current_seq_len(), k.dim(dim)?);
                        Ok(vec![k, v])
                    },
                    |k, v| theirs.append(k, v).map(|(k, v)| vec![k, v]),
                    calls,
                    tracked,
                )?;
                assert_eq!(cache.k_cache().max_seq_len(), theirs.k_cache().max_seq_len());

                let (mut cache, mut theirs) =
                    (ours::ConcatKvCache::new(dim), candles::ConcatKvCache::new(dim));
                side_by_side(
                    dim,
                    |k, v| cache.append(k, v).map(|(k, v)| vec![k, v]),
                    |k, v| theirs.append(k, v).map(|(k, v)| vec![k, v]),
                    calls,
                    tracked,
                )?;
                assert_eq!(cache.current_seq_len(), theirs.current_seq_len());

                let mut cache = ours::RotatingKvCache::new(dim, 4);
                let mut theirs = candles::RotatingKvCache::new(dim, 4);
                side_by_side(
                    dim,
                    |k, v| cache.append(k, v).map(|(k, v)| vec![k, v]),
                    |k, v| {
                        let (k, v) = theirs.append(k, v)?;
                        Ok(vec![k.copy()?, v.copy()?])
                    },
                    calls,
                    tracked,
                )?;
                assert_eq!(
                    (cache.offset(), cache.positions(2)),
                    (theirs.offset(), theirs.positions(2))
                );
                assert_eq!(
                    cache.k()?.map(|k| bits(&k)).transpose()?,
                    theirs.k()?.map(|k| bits(&k)).transpose()?
                );
            }
            let mut cache = ours::InterleavedKvCache::new(3);
            let mut theirs = candles::InterleavedKvCache::new(3);
            side_by_side(
                2,
                |k, v| cache.append(k, v).map(|kv| vec![kv]),
                |k, v| theirs.append(k, v).map(|kv| vec![kv]),
                calls,
                tracked,
            )?;
        }
    }
    Ok(())
}

/// What went in before is a constant, and a cache that was emptied knows nothing.
#[test]
fn earlier_calls_are_constants_and_a_reset_forgets_them() -> Result<()> {
    let first = Var::ones((1, 1, 2, 3), DType::F32, &Device::Cpu)?;
    let second = Var::ones((1, 1, 1, 3), DType::F32, &Device::Cpu)?;
    let mut cache = ours::KvCache::new(2, 8);
    cache.append(&first, &first)?;
    let (k, _) = cache.append(&second, &second)?;
    let grads = k.sqr()?.sum_all()?.backward()?;
    assert!(grads.get(&second).is_some());
    assert!(grads.get(&first).is_none());
    cache.reset();
    assert_eq!((cache.current_seq_len(), cache.k()?.is_none()), (0, true));
    let mut cache = ours::ConcatKvCache::new(2);
    cache.append(&first, &first)?;
    let (k, _) = cache.append(&second, &second)?;
    let grads = k.sqr()?.sum_all()?.backward()?;
    assert!(grads.get(&second).is_some() && grads.get(&first).is_none());
    assert_eq!(cache.into_inner().expect("keys and values").0.dims(), [1, 1, 3, 3]);
    Ok(())
}

/// What is asked for after a call has the gradient of that call, as what it returned has, and is what candle keeps.
#[test]
fn a_rotating_cache_keeps_the_gradient_of_the_last_call() -> Result<()> {
    for calls in CALLS {
        let (mut cache, mut theirs) =
            (ours::RotatingKvCache::new(2, 4), candles::RotatingKvCache::new(2, 4));
        for (call, positions) in calls.iter().enumerate() {
            let k = numbered(*positions, 2, 100 * call)?;
            let (key, value) = (Var::from_tensor(&k)?, Var::from_tensor(&(&k * 2.)?)?);
            cache.append(&key, &value)?;
            theirs.append(&k, &(&k * 2.)?)?;
            for (var, kept, expected) in
                [(&key, cache.k()?, theirs.k()?), (&value, cache.v()?, theirs.v()?)]
            {
                let (kept, expected) = (kept.expect("some"), expected.expect("some"));
                assert_eq!(bits(&kept)?, bits(&expected)?, "call {call} of {calls:?}");
                let grads = kept.sqr()?.sum_all()?.backward()?;
                // Twice the value of each position that is kept; the others are forgotten.
                let kept = (*positions).min(4);
                let zeros = var.narrow(2, 0, positions - kept)?.zeros_like()?;
                let last = (var.narrow(2, positions - kept, kept)?.detach() * 2.)?;
                let expected = Tensor::cat(&[zeros, last], 2)?;
                assert_eq!(bits(grads.get(var).expect("a gradient"))?, bits(&expected)?);
            }
        }
        cache.append(&numbered(1, 2, 0)?, &numbered(1, 2, 0)?)?;
        assert!(!cache.k()?.expect("keys").track_op(), "of a call without a gradient");
        let var = Var::from_tensor(&numbered(1, 2, 0)?)?;
        cache.append(&var, &var)?;
        cache.reset();
        assert!(cache.k()?.is_none() && cache.v()?.is_none());
    }
    Ok(())
}
