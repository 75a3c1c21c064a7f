//! Rotary embeddings: tables for each batch entry, offsets into a cache, the views that projections
//! leave, candle's own, and what is refused.

use candle_core::{DType, Device, IndexOp, Result, Tensor, Var};
use candle_dropout::functional::{RopeStyle, rope};
use candle_dropout::{Rope, RopeConfig, RopeScaling};
use cases::{bits, random};

const STYLES: [RopeStyle; 2] = [RopeStyle::HalfSplit, RopeStyle::Interleaved];

fn tables(style: RopeStyle, head_size: usize, dtype: DType) -> Result<Rope> {
    let config = RopeConfig { head_size, max_positions: 64, style, ..Default::default() };
    Rope::new(&config, dtype, &Device::Cpu)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.max_all()?.to_scalar()
}

#[test]
fn forward_equals_candles_and_unlike_candles_passes_a_gradient() -> Result<()> {
    for (dtype, bound) in
        [(DType::F32, 1e-6), (DType::F64, 1e-15), (DType::F16, 4e-3), (DType::BF16, 3e-2)]
    {
        let x = Var::from_tensor(&random(&[2, 3, 7, 16], dtype, 1)?)?;
        let weight = random(&[2, 3, 7, 16], dtype, 2)?;
        for style in STYLES {
            let table = tables(style, 16, dtype)?;
            let (cos, sin) = table.tables(0, 7)?;
            let (cos, sin) = (cos.to_dtype(dtype)?, sin.to_dtype(dtype)?);
            let theirs = match style {
                RopeStyle::HalfSplit => candle_nn::rotary_emb::rope(&x, &cos, &sin)?,
                RopeStyle::Interleaved => candle_nn::rotary_emb::rope_i(&x, &cos, &sin)?,
            };
            let ours = rope(&x, &cos, &sin, style)?;
            assert!(largest_difference(&ours, &theirs)? <= bound, "{dtype:?} {style:?}");
            assert!((theirs * &weight)?.backward()?.get(&x).is_none(), "candle's ends the graph");
            let grads = (ours * &weight)?.backward()?;
            let grad = grads.get(&x).expect("a gradient");
            // The gradient is the weight, turned back.
            let sin = sin.neg()?;
            let back = rope(&weight, &cos, &sin, style)?;
            assert_eq!(bits(grad)?, bits(&back)?);
        }
    }
    Ok(())
}

#[test]
fn tables_for_each_batch_entry_agree_with_the_formula() -> Result<()> {
    for dims in [&[3, 5, 6][..], &[3, 4, 5, 6], &[2, 5, 9, 32]] {
        let &[b, .., t, d] = dims else { unreachable!() };
        let [angle, x, dy] = [vec![b, t, d / 2], dims.to_vec(), dims.to_vec()]
            .map(|dims| random(&dims, DType::F64, 3));
        let (angle, x, dy) = (angle?, x?, dy?);
        let (cos, sin) = (angle.cos()?, angle.sin()?);
        for (dtype, bound) in [(DType::F64, 1e-14), (DType::F32, 1e-6)] {
            for style in STYLES {
                let run = |fused: bool, dtype: DType| -> Result<[Tensor; 2]> {
                    let var = Var::from_tensor(&x.to_dtype(dtype)?)?;
                    let (cos, sin) = (cos.to_dtype(dtype)?, sin.to_dtype(dtype)?);
                    let op = if fused { rope } else { cases::rope::formula };
                    let y = op(&var, &cos, &sin, style)?;
                    let grads = (&y * dy.to_dtype(dtype)?)?.backward()?;
                    Ok([y, grads.get(&var).expect("a gradient").clone()])
                };
                for (ours, exact) in run(true, dtype)?.iter().zip(run(false, DType::F64)?) {
                    let error = largest_difference(ours, &exact)?;
                    assert!(error < bound, "{dims:?} {dtype:?} {style:?}: {error}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_projections_view_is_rotated_as_its_copy_is() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        // [B, T, 3, H, D], the middle one of the three.
        let qkv = Var::from_tensor(&random(&[2, 7, 3, 5, 16], dtype, 1)?)?;
        let dy = random(&[2, 5, 7, 16], dtype, 2)?;
        for style in STYLES {
            let rope = tables(style, 16, dtype)?;
            let run = |copy: bool| -> Result<[Vec<u64>; 2]> {
                let k = qkv.i((.., .., 1))?.transpose(1, 2)?; // [B, H, T, D]
                let k = if copy { k.contiguous()? } else { k };
                let y = rope.rotate(&k, 3)?;
                // A gradient that is a view itself.
                let dy = dy.transpose(0, 1)?.contiguous()?.transpose(0, 1)?;
                let grads = (&y * &dy)?.backward()?;
                Ok([bits(&y)?, bits(grads.get(&qkv).expect("a gradient"))?])
            };
            assert_eq!(run(false)?, run(true)?);
        }
    }
    Ok(())
}

#[test]
fn a_cache_continues_where_it_ended() -> Result<()> {
    for style in STYLES {
        let rope = tables(style, 8, DType::F32)?;
        let (q, k) = (random(&[2, 4, 9, 8], DType::F32, 1)?, random(&[2, 2, 9, 8], DType::F32, 2)?);
        let (whole_q, whole_k) = rope.apply(&q, &k, 5)?;
        let (q, k) = rope.apply(&q.narrow(2, 6, 3)?, &k.narrow(2, 6, 3)?, 11)?;
        assert_eq!(bits(&q)?, bits(&whole_q.narrow(2, 6, 3)?.contiguous()?)?);
        assert_eq!(bits(&k)?, bits(&whole_k.narrow(2, 6, 3)?.contiguous()?)?);
    }
    Ok(())
}

#[test]
fn scores_depend_on_the_distance_alone() -> Result<()> {
    for style in STYLES {
        let rope = tables(style, 16, DType::F64)?;
        let (q, k) = (random(&[1, 16], DType::F64, 1)?, random(&[1, 16], DType::F64, 2)?);
        let score = |at: usize, distance: usize| -> Result<f64> {
            let (q, k) = (rope.rotate(&q, at + distance)?, rope.rotate(&k, at)?);
            (q * k)?.sum_all()?.to_scalar()
        };
        for distance in [0, 1, 17] {
            assert!((score(0, distance)? - score(40, distance)?).abs() < 1e-12);
        }
        assert!((score(0, 1)? - score(0, 17)?).abs() > 1e-3);
    }
    Ok(())
}

/// Angles of pair 0, of a middle pair and of the last one, at position 1 and 10, by the formulas of
/// the papers.
#[test]
fn tables_follow_theta_and_the_scaling() -> Result<()> {
    let angles = |scaling: RopeScaling| -> Result<Vec<f64>> {
        let config = RopeConfig {
            head_size: 8,
            max_positions: 11,
            theta: 10_000.,
            scaling,
            style: RopeStyle::HalfSplit,
        };
        let rope = Rope::new(&config, DType::F64, &Device::Cpu)?;
        let (cos, sin) = rope.tables(0, 11)?;
        let (cos, sin) = (cos.to_vec2::<f64>()?, sin.to_vec2::<f64>()?);
        assert_eq!([cos[0].as_slice(), &sin[0]], [[1.; 4], [0.; 4]]);
        Ok((0..4).map(|j| sin[1][j].atan2(cos[1][j])).collect())
    };
    let close = |got: Vec<f64>, expected: [f64; 4]| {
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-14, "{got}, not {expected}");
        }
    };
    close(angles(RopeScaling::None)?, [1., 0.1, 0.01, 0.001]);
    close(angles(RopeScaling::Linear { factor: 4. })?, [0.25, 0.025, 0.0025, 0.00025]);
    // In 2000 positions they turn 318, 31.8, 3.18 and 0.318 times: high, high, between, low.
    let llama = RopeScaling::Llama3 {
        factor: 8.,
        low_freq_factor: 1.,
        high_freq_factor: 4.,
        original_max_positions: 2000,
    };
    let smooth = (2000. * 0.01 / std::f64::consts::TAU - 1.) / 3.;
    let between = (1. - smooth) * 0.01 / 8. + smooth * 0.01;
    close(angles(llama)?, [1., 0.1, between, 0.000125]);
    // In 2000 positions pair j turns 32 times at j = 0.998 and once at j = 2.503: a ramp from 0 to 3.
    let yarn = |truncate| RopeScaling::Yarn {
        factor: 4.,
        attention_factor: 1.,
        beta_fast: 32.,
        beta_slow: 1.,
        original_max_positions: 2000,
        truncate,
    };
    let part = |frequency: f64, low: f64| frequency * (1. - low) + frequency / 4. * low;
    close(angles(yarn(true))?, [1., part(0.1, 1. / 3.), part(0.01, 2. / 3.), 0.00025]);
    let pair = |turns: f64| (2000. / (turns * std::f64::consts::TAU)).ln() / 10f64.ln();
    let low = |j: f64| (j - pair(32.)) / (pair(1.) - pair(32.));
    close(angles(yarn(false))?, [1., part(0.1, low(1.)), part(0.01, low(2.)), 0.00025]);
    Ok(())
}

#[test]
fn yarn_lengthens_queries_and_keys_and_their_gradients() -> Result<()> {
    let scaling = RopeScaling::Yarn {
        factor: 4.,
        attention_factor: 1.5,
        beta_fast: 32.,
        beta_slow: 1.,
        original_max_positions: 32,
        truncate: true,
    };
    let config = RopeConfig { head_size: 8, max_positions: 64, scaling, ..Default::default() };
    let rope = Rope::new(&config, DType::F64, &Device::Cpu)?;
    let x = Var::from_tensor(&random(&[3, 5, 8], DType::F64, 1)?)?;
    let y = rope.rotate(&x, 7)?;
    let squares = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f64>();
    assert!((squares(&y)? / squares(&x)? - 2.25).abs() < 1e-14);
    let grads = y.sqr()?.sum_all()?.backward()?;
    let expected = (x.as_tensor() * 4.5)?;
    assert!(largest_difference(grads.get(&x).expect("a gradient"), &expected)? < 1e-13);
    Ok(())
}

/// The place of a request, and the bits of its cosines and sines.
type Part = (usize, Vec<u64>, Vec<u64>);

/// Whatever is asked for first, and by however many threads.
#[test]
fn tables_grow_with_the_positions_and_hold_the_same_in_any_order() -> Result<()> {
    let config = RopeConfig { head_size: 8, max_positions: 1 << 40, ..Default::default() };
    let new = || Rope::new(&config, DType::F32, &Device::Cpu);
    let asked =
        [(3000, 5), (0, 3), (63, 2), (2047, 2), (1 << 39, 4), (5000, 0), (1, 1), (700, 600)];
    let parts = |rope: &Rope, order: &[usize]| -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        for &at in order {
            let (start, t) = asked[at];
            let (cos, sin) = rope.tables(start, t)?;
            assert_eq!((cos.dims(), sin.dims()), (&[t, 4][..], &[t, 4][..]));
            parts.push((at, bits(&cos.contiguous()?)?, bits(&sin.contiguous()?)?));
        }
        parts.sort();
        Ok(parts)
    };
    let expected = parts(&new()?, &[0, 1, 2, 3, 4, 5, 6, 7])?;
    let error = new()?.tables(0, 1 << 39).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("rope: positions: expected tables that fit into memory"), "{error}");
    for order in [[7, 6, 5, 4, 3, 2, 1, 0], [1, 5, 2, 6, 3, 0, 4, 7]] {
        assert_eq!(parts(&new()?, &order)?, expected);
        let shared = new()?;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let rope = shared.clone();
                    scope.spawn(move || parts(&rope, &order).expect("tables"))
                })
                .collect();
            for thread in threads {
                assert_eq!(thread.join().expect("no panic"), expected);
            }
        });
    }
    Ok(())
}

/// Asserts that a call fails and that its message holds every fragment.
#[track_caller]
fn fails<T>(result: Result<T>, fragments: &[&str]) {
    let error = result.err().expect("an error").to_string();
    for fragment in fragments {
        assert!(error.contains(fragment), "{fragment:?} is missing from: {error}");
    }
}

#[test]
fn errors_name_op_argument_expected_got_and_remedy() -> Result<()> {
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
    let style = RopeStyle::HalfSplit;
    let (x, table) = (zeros(&[2, 3, 5, 8])?, zeros(&[5, 4])?);
    fails(rope(&zeros(&[8])?, &table, &table, style), &["rope: x: expected [.., T, D], got [8]"]);
    let deep = zeros(&[1, 2, 3, 5, 8])?;
    fails(rope(&deep, &table, &table, style), &["rope: x: expected", "[1, 2, 3, 5, 8]; reshape"]);
    fails(rope(&zeros(&[5, 7])?, &table, &table, style), &["even last dimension, got [5, 7]"]);
    let whole = x.to_dtype(DType::U32)?;
    fails(rope(&whole, &table, &table, style), &["rope: x: expected dtype", "got U32"]);
    fails(
        rope(&x, &zeros(&[6, 4])?, &table, style),
        &["rope: cos: expected shape [T, D/2] = [5, 4]", "got [6, 4]; narrow it"],
    );
    fails(rope(&x, &table, &zeros(&[3, 5, 4])?, style), &["rope: sin: expected shape"]);
    fails(
        rope(&x, &table, &zeros(&[2, 5, 4])?, style),
        &["rope: sin: expected shape [5, 4] like cos, got [2, 5, 4]"],
    );
    let flat = zeros(&[5, 8])?;
    // Without batch entries no table of theirs is offered.
    fails(
        rope(&flat, &zeros(&[5, 5, 4])?, &table, style),
        &["rope: cos: expected shape [T, D/2] = [5, 4] for x [5, 8], got [5, 5, 4]"],
    );
    fails(rope(&x, &table.to_dtype(DType::I64)?, &table, style), &["rope: cos: expected dtype"]);
    let var = Var::from_tensor(&table)?;
    fails(rope(&x, &var, &table, style), &["rope: cos: expected a constant", "detach()"]);

    let tables = tables(style, 8, DType::F32)?;
    for start in [60, usize::MAX] {
        fails(tables.rotate(&x, start), &["start_pos + T <= max_positions = 64, got"]);
    }
    fails(tables.apply(&x, &zeros(&[2, 3, 4, 8])?, 0), &["rope: k: expected as many positions"]);
    let new = |config: RopeConfig| Rope::new(&config, DType::F32, &Device::Cpu);
    let config = RopeConfig::default;
    fails(new(RopeConfig { head_size: 7, ..config() }), &["rope: head_size: expected an even"]);
    fails(new(RopeConfig { max_positions: 0, ..config() }), &["rope: max_positions: expected"]);
    fails(new(RopeConfig { theta: f64::NAN, ..config() }), &["rope: theta: expected a positive"]);
    let scaling = RopeScaling::Linear { factor: 0. };
    fails(new(RopeConfig { scaling, ..config() }), &["rope: scaling.factor: expected a positive"]);
    let scaling = RopeScaling::Llama3 {
        factor: 8.,
        low_freq_factor: 4.,
        high_freq_factor: 4.,
        original_max_positions: 8192,
    };
    fails(new(RopeConfig { scaling, ..config() }), &["0 < low_freq_factor < high_freq_factor"]);
    let scaling = RopeScaling::Yarn {
        factor: 4.,
        attention_factor: 1.,
        beta_fast: 32.,
        beta_slow: 1.,
        original_max_positions: 8192,
        truncate: true,
    };
    fails(new(RopeConfig { scaling, theta: 1., ..config() }), &["expected a ramp", "theta 1;"]);
    fails(new(RopeConfig { head_size: 1 << 62, ..config() }), &["rope: head_size: expected one"]);
    Ok(())
}

#[test]
fn a_table_may_be_wider_than_x_and_is_used_in_f32() -> Result<()> {
    let x = random(&[3, 4], DType::F32, 1)?;
    let rope_f64 = tables(RopeStyle::HalfSplit, 4, DType::F64)?;
    let rope_f32 = tables(RopeStyle::HalfSplit, 4, DType::F32)?;
    assert_eq!(bits(&rope_f64.rotate(&x, 2)?)?, bits(&rope_f32.rotate(&x, 2)?)?);
    assert_eq!(rope_f32.tables(0, 3)?.0.dims(), [3, 2]);
    Ok(())
}
