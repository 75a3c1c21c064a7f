//! DropBlock and Cutout: what they drop, how often, and together with what.
//!
//! One text: the places of blocks that it writes out serve every fact of either.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{DropBlockConfig, drop_block};
use candle_dropout::{Cutout, DropBlock2d, DropMask, MaskGenerator, MaskKey, TrainMode};
use candle_nn::{Module, ModuleT};
use cases::drop_block::dropped;
use cases::runner::{gradient, same_bits};
use cases::{bits, random};

/// Standard deviations that a mean may be off by.
const SIGMA: f64 = 5.;

fn generator(seed: u64) -> Arc<MaskGenerator> {
    Arc::new(MaskGenerator::new(seed))
}

fn ones(dims: &[usize]) -> Result<Tensor> {
    Tensor::ones(dims, DType::F32, &Device::Cpu)
}

fn unscaled(block_size: usize) -> DropBlockConfig {
    DropBlockConfig { block_size, scale_by_keep: false, ..Default::default() }
}

fn numbers(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

fn mean(x: &Tensor) -> Result<f64> {
    x.to_dtype(DType::F64)?.mean_all()?.to_scalar()
}

fn fails<T>(result: Result<T>, fragments: &[&str]) {
    let error = result.err().map(|error| error.to_string()).expect("an error");
    for fragment in fragments {
        assert!(error.contains(fragment), "{fragment:?} is missing from: {error}");
    }
}

// ---- which elements a seed drops ----

/// The place of each seed that drops an element, by the closed form of the documentation.
fn reaching(config: &DropBlockConfig, [h, w]: [usize; 2], at: [usize; 2]) -> Vec<usize> {
    let blocks = [h, w].map(|size| config.block_size.min(size));
    let reaches = |axis: usize, seed: usize| {
        let (size, block, at) = ([h, w][axis], blocks[axis], at[axis]);
        let (before, after) = (block / 2, (block - 1) / 2);
        let is_inside = seed >= before && seed + after < size;
        (config.fast || is_inside) && seed <= at + before && at <= seed + after
    };
    let of_row =
        |i: usize| (0..w).filter(move |j| reaches(0, i) && reaches(1, *j)).map(move |j| i * w + j);
    (0..h).flat_map(of_row).collect()
}

/// Blocks of 3 and 2 in planes of 5 x 7: odd ones lie around their seed, even ones reach further up and left; or only
/// where they lie in the plane as a whole, which is where timm's mask of places for a block says.
#[test]
fn a_seed_drops_its_block_in_planes_of_5_by_7() -> Result<()> {
    let (h, w) = (5, 7);
    for block_size in 1..=8 {
        for fast in [true, false] {
            let config = DropBlockConfig { fast, ..unscaled(block_size) };
            let mut seen = 0;
            // At this rate most planes have one seed or none.
            let seeds = DropMask::new(0.03, MaskKey::derive(5, block_size as u64))?;
            let (n, x) = (500, ones(&[500, 1, h, w])?);
            let y = numbers(&drop_block(&x, &config, &seeds)?)?;
            let keep = seeds.to_tensor((n, h, w), &Device::Cpu)?.flatten_all()?.to_vec1::<u8>()?;
            for (at, y) in y.iter().enumerate() {
                let (plane, place) = (at / (h * w), at % (h * w));
                let seeds = reaching(&config, [h, w], [place / w, place % w]);
                let is_dropped = seeds.iter().any(|seed| keep[plane * h * w + seed] == 0);
                assert_eq!(*y == 0., is_dropped, "{config:?} element {at}");
                seen += usize::from(is_dropped);
            }
            assert!(seen > 100, "{config:?}: {seen}");
        }
    }
    Ok(())
}

#[test]
fn places_of_whole_blocks_are_those_of_timm() {
    let places = |block_size: usize| -> Vec<usize> {
        let config = DropBlockConfig { fast: false, ..unscaled(block_size) };
        let every = (0..35).flat_map(|at| reaching(&config, [5, 7], [at / 7, at % 7]));
        let mut places: Vec<_> = every.collect();
        places.sort_unstable();
        places.dedup();
        places
    };
    let rows = |rows: std::ops::Range<usize>, cols: std::ops::Range<usize>| -> Vec<usize> {
        rows.flat_map(|row| cols.clone().map(move |col| 7 * row + col)).collect()
    };
    assert_eq!(places(3), rows(1..4, 1..6));
    assert_eq!(places(2), rows(1..5, 1..7));
}

// ---- how often ----

/// Each element is kept with (1 - gamma)^seeds that reach it, and so are pairs, where gamma is the realised rate.
#[test]
fn elements_and_pairs_are_kept_as_often_as_their_seeds_are() -> Result<()> {
    let ([h, w], n) = ([6, 9], 20_000);
    for (fast, block_size, couple_channels) in
        [(true, 3, true), (true, 4, false), (false, 3, false), (false, 2, true)]
    {
        let config = DropBlockConfig { fast, couple_channels, ..unscaled(block_size) };
        let seeds = DropMask::new(config.gamma(0.2, h, w)?, MaskKey::derive(9, block_size as u64))?;
        let dims = if couple_channels { [n, 1, h, w] } else { [n / 4, 4, h, w] };
        let y = numbers(&drop_block(&ones(&dims)?, &config, &seeds)?)?;
        let mut reaching_any = Vec::new();
        for (a, b) in
            [(0, 0), (0, 1), (0, w), (0, 5 * w + 8), (2 * w + 4, 3 * w + 6), (4 * w + 4, 4 * w + 4)]
        {
            let mut both = reaching(&config, [h, w], [a / w, a % w]);
            both.extend(reaching(&config, [h, w], [b / w, b % w]));
            both.sort_unstable();
            both.dedup();
            let expected = seeds.rate().keep_p().powi(both.len() as i32);
            let kept = y.chunks_exact(h * w).filter(|y| y[a] != 0. && y[b] != 0.).count() as f64
                / n as f64;
            let sigma = (expected * (1. - expected) / n as f64).sqrt();
            assert!(
                (kept - expected).abs() < SIGMA * sigma,
                "{config:?} {a} {b}: {kept}, {expected}"
            );
            reaching_any.push(both.len());
        }
        assert!(
            reaching_any[0] < reaching_any[5],
            "a corner is reached by fewer: {reaching_any:?}"
        );
    }
    Ok(())
}

/// timm's test of the ratio, with bounds from the closed form: planes are independent.
#[test]
fn about_drop_p_is_dropped() -> Result<()> {
    let (h, w, planes) = (56, 56, 512);
    let layer = DropBlock2d::new(0.1, generator(123))?
        .with_config(DropBlockConfig { couple_channels: false, ..unscaled(7) });
    let y = layer.forward(&ones(&[32, 16, h, w])?, true)?;
    let key = generator(123).next_key();
    let keep_p = DropMask::new(layer.config().gamma(0.1, h, w)?, key)?.rate().keep_p();
    let exact = |at: usize| {
        let seeds = reaching(layer.config(), [h, w], [at / w, at % w]).len();
        1. - keep_p.powi(seeds as i32)
    };
    let expected = (0..h * w).map(exact).sum::<f64>() / (h * w) as f64;
    let of_planes: Vec<f64> = numbers(&y)?
        .chunks_exact(h * w)
        .map(|y| y.iter().filter(|y| **y == 0.).count() as f64 / (h * w) as f64)
        .collect();
    let ratio = of_planes.iter().sum::<f64>() / planes as f64;
    let variance =
        of_planes.iter().map(|plane| (plane - ratio).powi(2)).sum::<f64>() / (planes - 1) as f64;
    assert!(
        (ratio - expected).abs() < SIGMA * (variance / planes as f64).sqrt(),
        "{ratio} {expected}"
    );
    assert!((ratio - 0.1).abs() < 0.03, "{ratio}");
    Ok(())
}

/// Equation 1 of the paper, at a point, and at its ends.
#[test]
fn gamma_is_that_of_the_paper() -> Result<()> {
    let config = unscaled(7);
    let expected = 0.1 / 49. * (56. * 56.) / (50. * 50.);
    assert!((config.gamma(0.1, 56, 56)? - expected).abs() < 1e-15);
    // A block that is clipped to a plane is all of it; clipped to its height alone, it is that wide no more.
    assert!((config.gamma(0.3, 7, 7)? - 0.3).abs() < 1e-15);
    assert!((config.gamma(0.3, 2, 3)? - 0.3).abs() < 1e-15);
    assert!((config.gamma(0.3, 4, 14)? - 0.3 * 14. / (7. * 8.)).abs() < 1e-15);
    let half = DropBlockConfig { gamma_scale: 0.5, ..config };
    assert!((half.gamma(0.1, 56, 56)? - expected / 2.).abs() < 1e-15);
    assert_eq!(config.gamma(0., 56, 56)?, 0.);
    assert_eq!(config.gamma(0.5, 0, 56)?, 0.);
    Ok(())
}

// ---- timm's own tests of the layer ----

#[test]
fn shapes_stay_and_no_rate_drops_nothing() -> Result<()> {
    let sizes = [[7, 7], [4, 8], [10, 5], [3, 3], [8, 16], [16, 8], [7, 14], [14, 7]];
    for [h, w] in sizes {
        let x = random(&[2, 3, h, w], DType::F32, 1)?;
        for block_size in 2..=6 {
            let config = DropBlockConfig { block_size, ..Default::default() };
            let layer = DropBlock2d::new(0.1, generator(1))?.with_config(config);
            assert_eq!(layer.forward(&x, true)?.dims(), x.dims());
            let layer = DropBlock2d::new(0., generator(1))?.with_config(config);
            same_bits(&layer.forward(&x, true)?, &x, "no rate")?;
        }
    }
    Ok(())
}

#[test]
fn channels_share_their_blocks_if_they_are_coupled() -> Result<()> {
    for couple_channels in [true, false] {
        let config = DropBlockConfig { couple_channels, ..unscaled(5) };
        let layer = DropBlock2d::new(0.3, generator(42))?.with_config(config);
        let y = layer.forward(&ones(&[2, 4, 16, 16])?, true)?;
        for sample in 0..2 {
            let channels: Vec<_> =
                (0..4).map(|c| bits(&y.get(sample)?.get(c)?)).collect::<Result<_>>()?;
            assert!(channels.iter().skip(1).all(|of| (*of == channels[0]) == couple_channels));
        }
        assert_ne!(bits(&y.get(0)?)?, bits(&y.get(1)?)?, "samples are their own");
    }
    Ok(())
}

#[test]
fn a_mean_of_ones_stays_one_and_without_scale_ones_stay() -> Result<()> {
    let x = ones(&[2, 3, 16, 16])?;
    let scaled = DropBlock2d::new(0.3, generator(42))?
        .with_config(DropBlockConfig { block_size: 5, ..Default::default() });
    let y = scaled.forward(&x, true)?;
    assert!((mean(&y)? - 1.).abs() < 1e-6);
    assert!(numbers(&y)?.iter().all(|y| *y == 0. || *y > 1.));
    let plain = DropBlock2d::new(0.3, generator(42))?.with_config(unscaled(5));
    let bare = plain.forward(&x, true)?;
    assert!(numbers(&bare)?.iter().all(|y| [0., 1.].contains(y)));
    assert_eq!(bits(&y.ne(0.)?)?, bits(&bare.ne(0.)?)?);
    Ok(())
}

#[test]
fn evaluation_is_the_identity_and_draws_no_key() -> Result<()> {
    let (x, keys) = (random(&[2, 3, 8, 8], DType::F32, 1)?, generator(3));
    let layer = DropBlock2d::new(0.5, keys.clone())?
        .with_config(DropBlockConfig { block_size: 3, ..Default::default() });
    same_bits(&layer.forward(&x, false)?, &x, "evaluation")?;
    assert_eq!(keys.state().counter, 0);
    assert_ne!(bits(&layer.forward_t(&x, true)?)?, bits(&x)?);
    assert_eq!(keys.state().counter, 1);
    let mode = TrainMode::new();
    let mut switched = layer.switched(&mode);
    switched.layer_mut().set_drop_p(0.)?;
    same_bits(&switched.forward(&x)?, &x, "no rate")?;
    assert_eq!(keys.state().counter, 2, "a key is drawn whatever the rate");
    let _guard = mode.eval();
    switched.forward(&x)?;
    assert_eq!(keys.state().counter, 2);
    Ok(())
}

/// The layer is the op with seeds at gamma and the key of its generator; its gradient is that of the formula.
#[test]
fn the_layer_and_its_gradient_are_those_of_the_formula() -> Result<()> {
    let x = Var::from_tensor(&random(&[30, 4, 9, 10], DType::F32, 1)?)?;
    let dy = random(&[30, 4, 9, 10], DType::F32, 2)?;
    for fast in [true, false] {
        let config = DropBlockConfig { block_size: 4, fast, ..Default::default() };
        let layer = DropBlock2d::new(0.25, generator(6))?.with_config(config);
        let y = layer.forward(&x, true)?;
        let seeds = DropMask::new(config.gamma(0.25, 9, 10)?, generator(6).next_key())?;
        let keep = seeds.to_tensor((30, 9, 10), &Device::Cpu)?;
        let expected = cases::drop_block::formula(&x, &config, &keep)?;
        assert!(dropped(&config, &keep)?.sum_all()?.to_scalar::<f32>()? > 100.);
        same_bits(&y, &expected, "forward")?;
        same_bits(&gradient(&y, &dy, &x)?, &gradient(&expected, &dy, &x)?, "gradient")?;
    }
    Ok(())
}

// ---- ends, windows, what is refused ----

#[test]
fn if_nothing_is_kept_all_is_zero_and_no_infinity_is_left() -> Result<()> {
    let x = Var::from_tensor(&Tensor::full(f32::INFINITY, (2, 3, 4, 5), &Device::Cpu)?)?;
    for fast in [true, false] {
        let config = DropBlockConfig { block_size: 3, fast, ..Default::default() };
        let y = drop_block(&x, &config, &DropMask::new(1., MaskKey::new(1))?)?;
        assert!(numbers(&y)?.iter().all(|y| *y == 0.));
        let grads = y.backward()?;
        assert!(numbers(grads.get(&x).expect("a gradient"))?.iter().all(|dx| *dx == 0.));
    }
    Ok(())
}

/// Parts of a batch or of its channels draw their part of the blocks, with the scale of the whole.
#[test]
fn a_split_op_equals_the_unsplit_op() -> Result<()> {
    let x = random(&[5, 6, 9, 11], DType::F32, 1)?;
    let seeds = DropMask::new(0.01, MaskKey::derive(42, 7))?;
    for couple_channels in [true, false] {
        let config = DropBlockConfig { block_size: 3, couple_channels, ..Default::default() };
        let whole = drop_block(&x, &config, &seeds)?;
        assert!(numbers(&whole)?.contains(&0.));
        for (dim, from, len) in [(0, 1, 3), (0, 4, 1), (1, 2, 4)] {
            if couple_channels && dim == 1 {
                continue;
            }
            let mut start = vec![0; 4];
            start[dim] = from;
            let part_seeds = match couple_channels {
                true => seeds.window(&[5, 9, 11], &[start[0], 0, 0]),
                false => seeds.window(&[5, 6, 9, 11], &start),
            };
            let part = drop_block(&x.narrow(dim, from, len)?, &config, &part_seeds)?;
            same_bits(&part, &whole.narrow(dim, from, len)?, "part")?;
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_by_name() -> Result<()> {
    let (x, config, seeds) =
        (ones(&[2, 3, 8, 8])?, unscaled(3), DropMask::new(0.1, MaskKey::new(1))?);
    let of_config = |config| drop_block(&x, &config, &seeds);
    fails(of_config(unscaled(0)), &["drop_block: block_size: expected at least 1, got 0; pass 1"]);
    fails(
        drop_block(&x.get(0)?, &config, &seeds),
        &["drop_block: x: expected [N, C, H, W], got [3, 8, 8]; reshape it"],
    );
    fails(
        drop_block(&x.to_dtype(DType::U32)?, &config, &seeds),
        &["drop_block: x: expected dtype", "got U32", "to_dtype"],
    );
    fails(
        drop_block(&x, &config, &seeds.window(&[2, 9, 8], &[0, 1, 0])),
        &["drop_block: seeds.window: expected whole planes [.., 8, 8]", "[2, 9, 8]; split samples"],
    );
    fails(
        drop_block(&x, &config, &seeds.window(&[2, 3, 8, 8], &[0; 4])),
        &["drop_block: drop.window: expected full_shape and start of rank 3"],
    );
    fails(
        DropBlock2d::new(1.5, generator(1)),
        &["drop_block: drop_p: expected a probability of dropping in [0, 1], got 1.5"],
    );
    fails(config.gamma(-0.5, 8, 8), &["drop_block: drop_p: expected a probability", "-0.5"]);
    for gamma_scale in [30., -1., f64::NAN, f64::INFINITY] {
        let layer = DropBlock2d::new(0.9, generator(1))?
            .with_config(DropBlockConfig { gamma_scale, ..Default::default() });
        let fragments =
            ["drop_block: gamma_scale: expected a rate of seeds in [0, 1], got", "lower it"];
        fails(layer.forward(&x, true), &fragments);
        layer.forward(&x, false)?;
    }
    let layer = DropBlock2d::new(0.1, generator(1))?;
    fails(layer.forward(&x.get(0)?, true), &["drop_block: x: expected [N, C, H, W]"]);
    Ok(())
}

// ---- Cutout ----

/// The rows and columns that a call has cut, of each sample, from a tensor of ones.
fn squares(y: &Tensor) -> Result<Vec<[std::ops::Range<usize>; 2]>> {
    let &[n, c, h, w] = y.dims() else { candle_core::bail!("[N, C, H, W]") };
    let y = numbers(y)?;
    Ok((0..n)
        .map(|sample| {
            let plane = &y[sample * c * h * w..][..h * w];
            for channel in y[sample * c * h * w..][..c * h * w].chunks_exact(h * w) {
                assert_eq!(channel, plane, "channels lose the same square");
            }
            let cut: Vec<usize> = (0..h * w).filter(|at| plane[*at] == 0.).collect();
            let range = |of: &dyn Fn(usize) -> usize| {
                let places = cut.iter().map(|at| of(*at));
                places.clone().min().unwrap_or(0)..places.max().map_or(0, |last| last + 1)
            };
            let [rows, cols] = [range(&|at| at / w), range(&|at| at % w)];
            assert_eq!(rows.len() * cols.len(), cut.len(), "one square");
            assert!(!cut.is_empty());
            [rows, cols]
        })
        .collect())
}

/// Every row is cut as often as centres lie that reach it; so are columns; and the two are independent.
#[test]
fn cutout_cuts_one_square_around_a_uniform_centre() -> Result<()> {
    let (n, h, w) = (20_000, 7, 12);
    for length in [1, 4, 5, 9, 30] {
        let layer = Cutout::new(length, generator(length as u64))?;
        let squares = squares(&layer.forward(&ones(&[n, 2, h, w])?, true)?)?;
        let share = |axis: usize, size: usize, at: usize| {
            let reaches = |centre: &usize| {
                let first = *centre as i64 - (length / 2) as i64;
                (first..first + length as i64).contains(&(at as i64))
            };
            let expected = (0..size).filter(reaches).count() as f64 / size as f64;
            let cut = squares.iter().filter(|square| square[axis].contains(&at)).count() as f64
                / n as f64;
            let sigma = (expected * (1. - expected) / n as f64).sqrt();
            assert!(
                (cut - expected).abs() <= SIGMA * sigma,
                "{length} axis {axis} at {at}: {cut}, {expected}"
            );
            expected
        };
        let rows: Vec<f64> = (0..h).map(|at| share(0, h, at)).collect();
        let cols: Vec<f64> = (0..w).map(|at| share(1, w, at)).collect();
        for (row, col) in [(0, 0), (3, 6), (6, 11)] {
            let expected = rows[row] * cols[col];
            let both = squares.iter().filter(|[r, c]| r.contains(&row) && c.contains(&col)).count();
            let sigma = (expected * (1. - expected) / n as f64).sqrt();
            assert!(
                (both as f64 / n as f64 - expected).abs() <= SIGMA * sigma,
                "{length} {row} {col}"
            );
        }
        for [rows, cols] in squares {
            assert!(rows.len() <= length && cols.len() <= length);
            assert!(rows.len() == length || rows.start == 0 || rows.end == h);
            assert!(cols.len() == length || cols.start == 0 || cols.end == w);
        }
    }
    Ok(())
}

#[test]
fn cutout_fills_its_square_and_passes_the_gradient_elsewhere() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let x = Var::from_tensor(&random(&[4, 3, 9, 8], dtype, 1)?.affine(0., f64::NAN)?)?;
        let image = Var::from_tensor(&random(&[4, 3, 9, 8], dtype, 1)?)?;
        let cut = Cutout::new(4, generator(5))?.forward(&ones(&[4, 3, 9, 8])?, true)?.eq(0.)?;
        let layer = Cutout::new(4, generator(5))?.with_fill(0.5);
        let y = layer.forward(&image, true)?;
        let half = image.zeros_like()?.affine(1., 0.5)?;
        same_bits(&y, &cut.where_cond(&half, &image)?, "forward")?;
        let dy = random(&[4, 3, 9, 8], dtype, 2)?;
        let expected = cut.where_cond(&dy.zeros_like()?, &dy)?;
        for _ in 0..2 {
            same_bits(&gradient(&y, &dy, &image)?, &expected, "gradient")?;
        }
        // By selection: of NaN nothing is left in a square.
        let y = Cutout::new(4, generator(5))?.forward(&x, true)?;
        same_bits(&y.eq(0.)?, &cut, "what is cut of NaN")?;
    }
    Ok(())
}

#[test]
fn cutout_takes_strided_images_and_no_samples() -> Result<()> {
    let x = random(&[3, 8, 9, 4], DType::F32, 1)?.permute((0, 3, 1, 2))?;
    let y = Cutout::new(3, generator(1))?.forward(&x, true)?;
    let contiguous = Cutout::new(3, generator(1))?.forward(&x.contiguous()?, true)?;
    same_bits(&y, &contiguous, "strided")?;
    let none = Cutout::new(3, generator(1))?.forward(&ones(&[0, 3, 8, 8])?, true)?;
    assert_eq!(none.dims(), [0, 3, 8, 8]);
    Ok(())
}

#[test]
fn cutout_is_the_identity_in_evaluation_and_refuses_what_is_no_batch_of_images() -> Result<()> {
    let (x, keys) = (ones(&[2, 3, 8, 8])?, generator(1));
    let layer = Cutout::new(4, keys.clone())?;
    same_bits(&layer.forward(&x, false)?, &x, "evaluation")?;
    assert_eq!(keys.state().counter, 0);
    layer.forward_t(&x, true)?;
    layer.clone().switched(&TrainMode::new()).forward(&x)?;
    assert_eq!(keys.state().counter, 2);
    fails(
        Cutout::new(0, keys),
        &["cutout: length: expected at least 1, got 0; leave the layer out"],
    );
    fails(layer.forward(&x.get(0)?, true), &["cutout: xs: expected [N, C, H, W], got [3, 8, 8]"]);
    let whole = x.to_dtype(DType::U8)?;
    fails(layer.forward(&whole, true), &["cutout: xs: expected dtype", "got U8", "to_dtype"]);
    Ok(())
}
