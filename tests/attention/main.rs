//! What attention promises beyond its formula, which `ops.rs` checks: where its result lies, and the host's
//! manners.

mod far;

use std::cell::Cell;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::DropMask;
use candle_dropout::functional::{AttentionConfig, attention, attention_qkv};
use cases::attention::sizes;
use cases::runner::{devices, disagreements};
use cases::{View, bits, largest, mask, random};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

#[test]
fn strided_arguments_agree_with_the_formula() -> Result<()> {
    let causal = cases::attention::CASES.iter().find(|case| case.name() == "attention_causal");
    let causal = *causal.expect("a case");
    for view in View::ALL {
        for (size, dtype) in [
            ([2, 4, 2, 33, 70, 64], DType::F32),
            ([2, 4, 2, 33, 70, 64], DType::BF16),
            ([2, 3, 3, 70, 33, 17], DType::F16),
            ([2, 3, 1, 70, 33, 1], DType::F64),
        ] {
            assert_eq!(disagreements(causal, &size, view, 0.2, dtype, &devices())?, [""; 0]);
        }
    }
    Ok(())
}

#[test]
fn the_result_lies_in_memory_as_the_queries_do() -> Result<()> {
    let (config, drop) = (AttentionConfig::default(), DropMask::none());
    let x = random(&[2, 7, 3, 8], DType::F32, 1)?;
    let (heads_first, rows_first) = (x.clone(), x.transpose(1, 2)?);
    assert!(attention(&heads_first, &heads_first, &heads_first, &config, &drop)?.is_contiguous());
    let o = attention(&rows_first, &rows_first, &rows_first, &config, &drop)?;
    assert_eq!(o.dims(), [2, 3, 7, 8]);
    assert!(o.transpose(1, 2)?.is_contiguous());
    let copied = rows_first.contiguous()?;
    let expected = attention(&copied, &copied, &copied, &config, &drop)?;
    assert_eq!(bits(&o.contiguous()?)?, bits(&expected)?);
    Ok(())
}

#[test]
fn queries_keys_and_values_in_one_tensor_give_the_same_bits() -> Result<()> {
    for (dtype, [b, s, heads, kv_heads, d]) in [
        (DType::F32, [2, 70, 4, 4, 64]),
        (DType::F32, [2, 33, 6, 2, 17]),
        (DType::BF16, [1, 300, 2, 1, 32]),
        (DType::F16, [2, 9, 3, 3, 8]),
        (DType::F64, [2, 9, 3, 1, 8]),
    ] {
        let dims = [b, s, heads + 2 * kv_heads, d];
        let config = AttentionConfig { causal: true, ..Default::default() };
        let (drop, dout) = (mask(0.3), random(&[b, s, heads, d], dtype, 5)?);
        let wide = Var::from_tensor(&random(&[b, s + 2, dims[2], d], dtype, 1)?)?;
        for offset in [0, 2] {
            let qkv = wide.narrow(1, offset, s)?;
            let part = |from, len| qkv.narrow(2, from, len)?.transpose(1, 2);
            let (q, k) = (part(0, heads)?, part(heads, kv_heads)?);
            let v = part(heads + kv_heads, kv_heads)?;
            let apart = attention(&q, &k, &v, &config, &drop)?.transpose(1, 2)?;
            let together = attention_qkv(&qkv, heads, &config, &drop)?;
            assert_eq!(together.dims(), [b, s, heads, d]);
            assert!(bits(&together)? == bits(&apart.contiguous()?)?);
            let grad = |o: &Tensor| Ok((o * &dout)?.backward()?.get(&wide).unwrap().clone());
            let (together, apart): (Result<Tensor>, Result<Tensor>) =
                (grad(&together), grad(&apart));
            assert_eq!(together?.dims(), wide.dims());
            // Candle adds zeros, which turn -0 into 0, to each part.
            let difference = (grad(&attention_qkv(&qkv, heads, &config, &drop)?)? - apart?)?;
            assert_eq!(largest(&difference.to_dtype(DType::F64)?)?, 0.);
        }
    }
    Ok(())
}

#[test]
fn empty_tensors_give_empty_or_zero_outputs_and_gradients() -> Result<()> {
    for dims in [
        [0, 2, 2, 3, 3, 4],
        [2, 0, 0, 3, 3, 4],
        [2, 2, 1, 0, 3, 4],
        [2, 2, 1, 3, 0, 4],
        [2, 2, 1, 3, 3, 0],
    ] {
        for drop_p in [0., 0.3, 1.] {
            let sizes = sizes(dims);
            let vars = [sizes.q(), sizes.k(), sizes.k()]
                .map(|dims| Var::ones(&dims, DType::F32, &Device::Cpu).unwrap());
            let config = AttentionConfig::default();
            let o = attention(&vars[0], &vars[1], &vars[2], &config, &mask(drop_p))?;
            assert_eq!(o.dims(), sizes.q());
            assert_eq!(largest(&o.to_dtype(DType::F64)?)?, 0.);
            let grads = o.backward()?;
            for var in &vars {
                assert_eq!(grads.get(var).unwrap().dims(), var.dims(), "{sizes:?}");
                assert_eq!(largest(&grads.get(var).unwrap().to_dtype(DType::F64)?)?, 0.);
            }
        }
    }
    Ok(())
}

#[test]
fn only_tracked_arguments_get_a_gradient_and_a_second_backward_the_same() -> Result<()> {
    let sizes = sizes([2, 4, 2, 33, 40, 16]);
    let x = [sizes.q(), sizes.k(), sizes.k()];
    let x: Vec<_> = (0..3).map(|i| random(&x[i], DType::F32, i as u64).unwrap()).collect();
    let vars: Vec<_> = x.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let (config, drop) = (AttentionConfig::default(), mask(0.3));
    let o = attention(&vars[0], &vars[1], &vars[2], &config, &drop)?.sqr()?;
    let (first, second) = (o.backward()?, o.backward()?);
    for (i, var) in vars.iter().enumerate() {
        assert_eq!(bits(first.get(var).unwrap())?, bits(second.get(var).unwrap())?);
        let mut some = x.clone();
        some[i] = var.as_tensor().clone();
        let grads = attention(&some[0], &some[1], &some[2], &config, &drop)?.sqr()?.backward()?;
        assert_eq!(bits(grads.get(var).unwrap())?, bits(first.get(var).unwrap())?);
        assert!((0..3).filter(|j| *j != i).all(|j| grads.get(&some[j]).is_none()));
    }
    Ok(())
}

#[test]
fn no_result_depends_on_the_number_of_threads() -> Result<()> {
    for dims in [[1, 1, 1, 700, 700, 32], [2, 4, 2, 130, 300, 64], [1, 4, 1, 3, 5000, 32]] {
        let sizes = sizes(dims);
        let results = || {
            let vars = [sizes.q(), sizes.k(), sizes.k()].into_iter().enumerate();
            let vars =
                vars.map(|(i, dims)| Var::from_tensor(&random(&dims, DType::F32, i as u64)?));
            let vars = vars.collect::<Result<Vec<_>>>()?;
            let config = AttentionConfig { causal: true, ..Default::default() };
            let o = attention(&vars[0], &vars[1], &vars[2], &config, &mask(0.3))?;
            let grads = o.sqr()?.backward()?;
            let mut all = bits(&o)?;
            for var in &vars {
                all.extend(bits(grads.get(var).unwrap())?);
            }
            Ok::<_, candle_core::Error>(all)
        };
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(results)
        };
        let one = with(1)?;
        assert!(one == with(2)?);
        assert!(one == with(5)?);
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let (q, k) = (random(&[2, 4, 5, 8], DType::F32, 1)?, random(&[2, 2, 7, 8], DType::F32, 2)?);
    let drop = DropMask::none();
    let none = AttentionConfig::default();
    let error = |q: &Tensor, k: &Tensor, v: &Tensor, config: &AttentionConfig| {
        attention(q, k, v, config, &drop).unwrap_err().to_string()
    };
    let vector = |x: &[u32]| Some(Tensor::new(x, &Device::Cpu).unwrap());
    let slopes = |x: &[f32]| Some(Tensor::new(x, &Device::Cpu).unwrap());
    let odd = random(&[2, 3, 7, 8], DType::F32, 3)?;
    let tracked = Var::new(&[1f32; 4], &Device::Cpu)?;
    for (message, expected) in [
        (error(&q.to_dtype(DType::U32)?, &k, &k, &none), "attention: q: expected dtype"),
        (error(&q, &k.to_dtype(DType::F16)?, &k, &none), "attention: k: expected dtype F32"),
        (error(&q.flatten(0, 1)?, &k, &k, &none), "attention: q: expected [B, H, S, D]"),
        (
            error(&q, &k, &k.squeeze(0)?.flatten(0, 1)?, &none),
            "attention: v: expected [B, H, S, D]",
        ),
        (error(&q, &k.narrow(3, 0, 4)?, &k, &none), "attention: k: expected [2, Hkv, Sk, 8]"),
        (error(&q, &k.narrow(0, 0, 1)?, &k, &none), "attention: k: expected [2, Hkv, Sk, 8]"),
        (error(&q, &k, &k.narrow(2, 0, 4)?, &none), "attention: v: expected shape [2, 2, 7, 8]"),
        (
            error(&q, &odd, &odd, &none),
            "attention: k: expected a number of heads that divides the 4",
        ),
        (
            error(&q, &k, &k, &AttentionConfig { scale: Some(f64::NAN), ..none.clone() }),
            "attention: scale: expected a finite f32, got NaN",
        ),
        (
            error(&q, &k, &k, &AttentionConfig { softcap: Some(0.), ..none.clone() }),
            "attention: softcap: expected a finite number above 0, got 0",
        ),
        (
            error(&q, &k, &k, &AttentionConfig { key_lengths: vector(&[1; 3]), ..none.clone() }),
            "attention: key_lengths: expected U32 of shape [2], got U32 of shape [3]",
        ),
        (
            error(&q, &k, &k, &AttentionConfig { key_lengths: vector(&[7, 8]), ..none.clone() }),
            "attention: key_lengths: expected at most Sk = 7, got 8 for sample 1",
        ),
        (
            error(&q, &k, &k, &AttentionConfig { key_lengths: slopes(&[1.; 2]), ..none.clone() }),
            "attention: key_lengths: expected U32 of shape [2], got F32",
        ),
        (
            error(&q, &k, &k, &AttentionConfig { alibi_slopes: slopes(&[1.; 2]), ..none.clone() }),
            "attention: alibi_slopes: expected F32 of shape [4], got F32 of shape [2]",
        ),
        (
            error(
                &q,
                &k,
                &k,
                &AttentionConfig {
                    alibi_slopes: Some(tracked.as_tensor().clone()),
                    ..none.clone()
                },
            ),
            "attention: alibi_slopes: expected a constant",
        ),
        (
            attention(&q, &k, &k, &none, &mask(0.1).window(&[2, 4, 5, 6], &[0; 4]))
                .unwrap_err()
                .to_string(),
            "attention: drop.window: expected start + shape <= full_shape",
        ),
        (
            attention_qkv(&q.transpose(1, 2)?, 1, &none, &drop).unwrap_err().to_string(),
            "attention: qkv: expected 1 heads of queries",
        ),
        (
            attention_qkv(&q.flatten(0, 1)?, 1, &none, &drop).unwrap_err().to_string(),
            "attention: qkv: expected [B, S, H + 2 Hkv, D]",
        ),
    ] {
        assert!(message.starts_with(expected), "{message}");
    }
    Ok(())
}

/// A call on small tensors that mostly go together, with a config and a window that may be anything.
#[derive(Clone, Debug)]
struct Call {
    dims: [Vec<usize>; 3],
    /// Of q and k, and of v.
    dtypes: [DType; 2],
    /// One tensor with so many heads of queries, rather than three.
    packed: Option<usize>,
    config: AttentionConfig,
    drop: DropMask,
}

fn call() -> impl Strategy<Value = Call> {
    let sizes = (0usize..3, 0usize..3, 0usize..3, 0usize..5, 0usize..5, 0usize..4);
    let other = prop::option::weighted(0.1, prop::collection::vec(0usize..4, 0..6));
    let dtype = || prop::sample::select(vec![DType::F32, DType::F64, DType::BF16, DType::U32]);
    let number = || {
        let numbers = [f64::NAN, f64::INFINITY, -1., 0., 1e-30, 0.7, 1e30];
        prop::option::weighted(0.3, prop::sample::select(numbers.to_vec()))
    };
    let side = || prop::sample::select(vec![0, 1, 2, usize::MAX - 1, usize::MAX]);
    let vector = |dtype: DType| {
        let of = move |(len, value): (usize, f32)| {
            Tensor::full(value, len, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        };
        prop::option::weighted(
            0.3,
            (0usize..4, prop::sample::select(vec![0., 1., 3., 9.])).prop_map(of),
        )
    };
    let config = (
        (number(), any::<[bool; 2]>(), prop::option::weighted(0.3, (side(), side())), number()),
        vector(DType::U32),
        vector(DType::F32),
    )
        .prop_map(
            |((scale, [causal, drop_key], window, softcap), key_lengths, alibi_slopes)| {
                AttentionConfig {
                    scale,
                    causal,
                    window,
                    softcap,
                    key_lengths,
                    alibi_slopes,
                    drop_key,
                }
            },
        );
    let full = || prop::collection::vec(0usize..6, 3..6);
    let window = prop::option::weighted(0.3, (full(), full()));
    let drop = (0u8..5, window).prop_map(|(quarters, window)| {
        let drop = mask(f32::from(quarters) / 4.);
        window.map_or(drop.clone(), |(full, start)| drop.window(&full, &start))
    });
    let dtypes = (dtype(), prop::option::weighted(0.1, dtype()))
        .prop_map(|(dtype, other)| [dtype, other.unwrap_or(dtype)]);
    (sizes, other, dtypes, prop::option::weighted(0.3, 0usize..4), config, drop).prop_map(
        |((b, group, kv, sq, sk, d), other, dtypes, packed, config, drop)| {
            let k = vec![b, kv, sk, d];
            let v = other.unwrap_or_else(|| k.clone());
            Call { dims: [vec![b, group * kv, sq, d], k, v], dtypes, packed, config, drop }
        },
    )
}

#[test]
fn a_call_succeeds_or_fails_but_never_panics() {
    let config = ProptestConfig { cases: 4000, failure_persistence: None, ..Default::default() };
    let successes = Cell::new(0);
    let outcome = TestRunner::new(config).run(&call(), |call| {
        let Call { dims, dtypes, packed, config, drop } = call;
        let ones = |dims: &[usize], dtype| Var::ones(dims, dtype, &Device::Cpu).unwrap();
        let [q, k, v] = [0, 1, 2].map(|i| ones(&dims[i], dtypes[usize::from(i == 2)]));
        let (o, vars, shape) = match packed {
            None => (attention(&q, &k, &v, &config, &drop), vec![&q, &k, &v], dims[0].clone()),
            Some(heads) => {
                let mut shape = dims[0].clone();
                shape[2] = heads;
                (attention_qkv(&q, heads, &config, &drop), vec![&q], shape)
            }
        };
        if let Ok(o) = o {
            prop_assert_eq!(o.dims(), shape);
            let grads = o.backward().unwrap();
            for var in vars {
                prop_assert_eq!(grads.get(var).unwrap().dims(), var.dims());
            }
            successes.set(successes.get() + 1);
        }
        Ok(())
    });
    outcome.unwrap();
    assert!(successes.get() > 100, "only {} calls succeeded", successes.get());
}
