//! Masks that are shared over dimensions, and the layers that have them: what drops together, how often, and
//! PyTorch's and Keras' own cases.
//!
//! One text: most facts are about one table of layers.

use std::sync::Arc;

use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_dropout::functional::{alpha_dropout, broadcast_dropout, dropout, embedding_dropout};
use candle_dropout::{
    AlphaDropout, BroadcastDropout, DropHead, DropMask, Dropout, Dropout1d, Dropout2d, Dropout3d,
    EmbeddingDropout, FeatureAlphaDropout, LayerDrop, LockedDropout, MaskGenerator, MaskKey,
    TokenDropout,
};
use cases::{DTYPES, bits, mask, random};
use proptest::prelude::*;

/// A bound on a standard normal variable that a sound mask passes but once in 150,000 checks.
const SIGMAS: f64 = 4.5;

fn generator(seed: u64) -> Arc<MaskGenerator> {
    Arc::new(MaskGenerator::new(seed))
}

fn ones(dims: &[usize]) -> Result<Tensor> {
    Tensor::ones(dims, DType::F32, &Device::Cpu)
}

fn floats(x: &Tensor) -> Result<Vec<f64>> {
    x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// Mean and variance.
fn moments(x: &[f64]) -> (f64, f64) {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    (mean, x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64)
}

/// Asserts that each group of `len` elements is dropped as a whole or kept and scaled, at the realised rate of
/// `drop_p`, to [`SIGMAS`].
fn drops_groups(y: &Tensor, len: usize, drop_p: f64) -> Result<()> {
    let keep_p = ((1. - drop_p) * 65536.).round() / 65536.;
    let (y, kept_value) = (floats(y)?, f64::from((1. / keep_p) as f32));
    let groups: Vec<&[f64]> = y.chunks(len).collect();
    assert!(groups.iter().all(|group| group.iter().all(|y| *y == group[0])), "as a whole");
    assert!(groups.iter().all(|group| [0., kept_value].contains(&group[0])), "scaled or 0");
    let kept = groups.iter().filter(|group| group[0] != 0.).count() as f64;
    let (n, variance) = (groups.len() as f64, keep_p * (1. - keep_p));
    let z = (kept - n * keep_p) / (n * variance).sqrt();
    assert!(z.abs() < SIGMAS, "{kept} of {n} groups are kept: {z} sigma");
    Ok(())
}

// ---- the op ----

/// A shape, whether each dimension is shared, and where a part begins in each.
fn shared_shape() -> impl Strategy<Value = Vec<(usize, bool, usize)>> {
    // Up to five dimensions: before the last one that is not shared at most four groups alternate.
    prop::collection::vec((1usize..6, any::<bool>(), 0usize..20), 0..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// The mask is that of a tensor without the shared dimensions, window and all, and sharing changes nothing else.
    #[test]
    fn a_shared_mask_is_the_mask_of_what_is_not_shared(shape in shared_shape(), seed in any::<u64>()) {
        let dims: Vec<usize> = shape.iter().map(|(dim, ..)| *dim).collect();
        let shared: Vec<usize> = (0..dims.len()).filter(|d| shape[*d].1).collect();
        let own = shape.iter().filter(|(_, shared, _)| !shared);
        let (own, start): (Vec<usize>, Vec<usize>) = own.map(|(dim, _, start)| (*dim, *start)).unzip();
        let full: Vec<usize> = own.iter().zip(&start).map(|(dim, start)| dim + start).collect();
        // A window that splits many dimensions is refused, so not all of them do.
        let drop = DropMask::new(0.4, MaskKey::new(seed)).unwrap();
        let drop = if own.len() > 2 { drop } else { drop.window(&full, &start) };
        let x = random(&dims, DType::F32, seed).unwrap();
        let y = broadcast_dropout(&x, shared.clone(), &drop).unwrap();

        let with_ones: Vec<usize> = shape.iter().map(|(dim, shared, _)| if *shared { 1 } else { *dim }).collect();
        let keep = drop.to_tensor(own, &Device::Cpu).unwrap().reshape(with_ones).unwrap();
        let keep = keep.broadcast_as(x.shape()).unwrap().contiguous().unwrap();
        let scaled = (&x * f64::from(drop.rate().scale())).unwrap();
        let expected = keep.where_cond(&scaled, &x.zeros_like().unwrap()).unwrap();
        prop_assert_eq!(bits(&y).unwrap(), bits(&expected).unwrap());
    }
}

#[test]
fn shared_masks_equal_those_of_an_independent_implementation() -> Result<()> {
    let mut masks = 0;
    for line in include_str!("mask_vectors.txt").lines() {
        let field: Vec<_> = line.split(' ').collect();
        let key = MaskKey::new(u64::from_str_radix(field[2], 16).unwrap());
        let drop_p: f32 = field[3].parse().unwrap();
        let (row, col): (usize, usize) = (field[5].parse().unwrap(), field[6].parse().unwrap());
        let keep: Vec<u8> = field[8].bytes().map(|bit| bit - b'0').collect();
        let (n, drop) = (keep.len(), DropMask::new(drop_p, key)?);
        let drop = drop.window(&[row + 1, col + n], &[row, col]);
        // Behind the mask, between its dimensions, before them, and where a size of 1 is not shared.
        for (dims, shared) in [
            (vec![1, n, 3], vec![2]),
            (vec![1, 3, n], vec![1]),
            (vec![3, 1, n], vec![0]),
            (vec![3, 1, 1, n, 1], vec![0, 2, 4]),
        ] {
            let y = broadcast_dropout(&ones(&dims)?, shared.clone(), &drop)?;
            let dropped = |y: f64| u8::from(y != 0.);
            let y = shared.iter().rev().try_fold(y, |y, d| y.get_on_dim(*d, y.dim(*d)? - 1))?;
            let y: Vec<u8> = floats(&y)?.into_iter().map(dropped).collect();
            assert_eq!(y, keep, "{dims:?} over {shared:?}");
            masks += 1;
        }
    }
    assert_eq!(masks, 4 * 26);
    Ok(())
}

/// Which dimensions are shared decides, and never how large they are.
#[test]
fn no_coordinate_shifts_where_a_dimension_has_size_1() -> Result<()> {
    let drop = mask(0.5);
    let masks = |dims: &[usize]| -> Result<Vec<u64>> {
        bits(&broadcast_dropout(&ones(dims)?, (2, 3), &drop)?.mean((2, 3))?)
    };
    assert_eq!(masks(&[6, 8, 1, 1])?, masks(&[6, 8, 5, 3])?);
    assert_eq!(masks(&[6, 8, 1, 1])?, bits(&dropout(&ones(&[6, 8])?, &drop)?)?);
    assert_eq!(masks(&[6, 1, 2, 2])?, bits(&dropout(&ones(&[6, 1])?, &drop)?)?);
    let alone = broadcast_dropout(&ones(&[])?, (), &drop)?;
    assert_eq!(bits(&alone)?, bits(&broadcast_dropout(&ones(&[1])?, 0, &drop)?)?);
    Ok(())
}

#[test]
fn dropped_infinities_and_nans_vanish() -> Result<()> {
    let drop = mask(0.5);
    let keep = drop.to_tensor((4, 8), &Device::Cpu)?;
    for dtype in DTYPES {
        let spread = keep.unsqueeze(2)?.broadcast_as((4, 8, 3))?.contiguous()?;
        let x = random(&[4, 8, 3], dtype, 1)?;
        let nan = (x.zeros_like()? / 0.)?;
        let poisoned = Var::from_tensor(&spread.where_cond(&x, &nan)?)?;
        let y = broadcast_dropout(&poisoned, 2, &drop)?;
        assert_eq!(bits(&y)?, bits(&broadcast_dropout(&x, 2, &drop)?)?);
        // An infinite gradient of what is dropped vanishes as well.
        let infinite = spread.where_cond(&x.ones_like()?, &(x.ones_like()? / 0.)?)?;
        let gradients = (broadcast_dropout(&poisoned, 2, &drop)?.broadcast_mul(&infinite))?
            .sum_all()?
            .backward()?;
        let dx = gradients.get(&poisoned).expect("a gradient");
        assert_eq!(bits(dx)?, bits(&broadcast_dropout(&x.ones_like()?, 2, &drop)?)?);
        let words = embedding_dropout(
            &nan,
            &Tensor::zeros((4, 8), DType::U32, &Device::Cpu)?,
            &DropMask::new(1., MaskKey::new(0))?,
        )?;
        assert_eq!(bits(&words)?, bits(&x.zeros_like()?)?);
    }
    Ok(())
}

#[test]
fn errors_name_op_argument_expected_got_and_remedy() -> Result<()> {
    let fails = |result: Result<Tensor>, parts: &[&str]| {
        let error = result.unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{part:?} is missing from: {error}");
        }
    };
    let (x, drop) = (ones(&[2, 3, 4])?, mask(0.5));
    let ids = Tensor::zeros((2, 3), DType::U32, &Device::Cpu)?;
    fails(
        broadcast_dropout(&x, 3, &drop),
        &["broadcast_dropout: shared: expected dimensions of x"],
    );
    fails(
        broadcast_dropout(&x, (1, 1), &drop),
        &["broadcast_dropout: shared: expected dimensions"],
    );
    fails(alpha_dropout(&x, 3, &drop), &["alpha_dropout: shared: expected dimensions of x"]);
    fails(
        broadcast_dropout(&x, 1, &drop.window(&[2, 3, 4], &[0, 0, 0])),
        &["broadcast_dropout: drop.window: expected full_shape and start of rank 2", "[2, 4]"],
    );
    for part in [drop.window(&[10], &[3]), drop.window(&[2, 3], &[0, 0])] {
        fails(
            embedding_dropout(&x, &ids, &part),
            &["embedding_dropout: drop.window: expected none", "without it"],
        );
    }
    let apart = ones(&[2; 6])?;
    fails(
        broadcast_dropout(&apart, (0, 2, 4), &mask(0.5)),
        &["broadcast_dropout: shared: expected at most four groups", "permute"],
    );
    fails(broadcast_dropout(&ids, 0, &drop), &["broadcast_dropout: x: expected dtype f32"]);
    fails(embedding_dropout(&ids, &ids, &drop), &["embedding_dropout: x: expected dtype f32"]);
    fails(embedding_dropout(&x, &x, &drop), &["embedding_dropout: ids: expected shape [2, 3]"]);
    let floats = x.mean(2)?;
    fails(
        embedding_dropout(&x, &floats, &drop),
        &["embedding_dropout: ids: expected dtype u32 or i64"],
    );
    fails(
        embedding_dropout(&ones(&[])?, &ids, &drop),
        &["embedding_dropout: x: expected embeddings"],
    );
    let generator = generator(1);
    fails(
        Dropout2d::new(0.5, generator.clone())?.forward(&ones(&[2, 3])?, true),
        &["dropout2d: xs: expected [N, C, H, W] or [C, H, W], got [2, 3]"],
    );
    fails(
        Dropout1d::new(0.5, generator.clone())?.forward(&apart, true),
        &["dropout1d: xs: expected"],
    );
    fails(Dropout3d::new(0.5, generator.clone())?.forward(&x, false), &["dropout3d: xs: expected"]);
    fails(
        LockedDropout::new(0.5, generator.clone())?.forward(&apart, true),
        &["locked_dropout: xs: expected [B, T, C]"],
    );
    fails(
        DropHead::new(0.5, generator.clone())?.forward(&x, true),
        &["drop_head: xs: expected [B, H, S, D]"],
    );
    fails(
        TokenDropout::new(0.5, generator.clone())?.forward(&ones(&[3])?, true),
        &["token_dropout: xs: expected [.., T, C]"],
    );
    fails(
        FeatureAlphaDropout::new(0.5, generator.clone())?.forward(&ones(&[3])?, true),
        &["feature_alpha_dropout: xs: expected [N, C, ..]"],
    );
    let noise = BroadcastDropout::new(0.5, &[None, Some(1), Some(5)], generator.clone())?;
    fails(
        noise.forward(&x, true),
        &["broadcast_dropout: xs: expected a shape that the noise shape", "got [2, 3, 4]"],
    );
    assert_eq!(generator.state().counter, 0, "no key is drawn for what is refused");
    Ok(())
}

// ---- the layers ----

type New = fn(f64, Arc<MaskGenerator>) -> Result<Box<dyn ModuleT>>;

fn of<L: ModuleT + 'static>(layer: Result<L>) -> Result<Box<dyn ModuleT>> {
    Ok(Box::new(layer?))
}

/// A layer, a shape that it takes, and how many elements in line drop together; 0 if they do not lie in line.
const LAYERS: &[(&str, New, &[usize], usize)] = &[
    ("dropout", |p, g| of(Dropout::with_generator(p, g)), &[10, 400], 1),
    ("dropout1d", |p, g| of(Dropout1d::new(p, g)), &[10, 40, 2], 2),
    ("dropout2d", |p, g| of(Dropout2d::new(p, g)), &[10, 40, 2, 2], 4),
    ("dropout3d", |p, g| of(Dropout3d::new(p, g)), &[10, 40, 2, 2, 2], 8),
    ("locked", |p, g| of(LockedDropout::new(p, g)), &[20, 3, 40], 0),
    ("token", |p, g| of(TokenDropout::new(p, g)), &[20, 40, 3], 3),
    ("head", |p, g| of(DropHead::new(p, g)), &[20, 40, 3, 5], 15),
    (
        "noise shape",
        |p, g| of(BroadcastDropout::new(p, &[None, Some(1), None], g)),
        &[20, 3, 40],
        0,
    ),
    ("alpha", |p, g| of(AlphaDropout::new(p, g)), &[10, 400], 0),
    ("feature alpha", |p, g| of(FeatureAlphaDropout::new(p, g)), &[10, 40, 2, 2], 0),
];

/// PyTorch's cases: p in {0, 1} x train, and rates that are refused.
#[test]
fn the_ends_of_the_rate_and_what_lies_beyond() -> Result<()> {
    for (name, new, dims, _) in LAYERS {
        let x = random(dims, DType::F32, 3)?;
        for train in [true, false] {
            let all = new(0., generator(1))?.forward_t(&x, train)?;
            assert_eq!(bits(&all)?, bits(&x)?, "{name} at 0, train {train}");
        }
        let none = new(1., generator(1))?.forward_t(&x, true)?;
        assert_eq!(bits(&none)?, bits(&x.zeros_like()?)?, "{name} at 1");
        assert_eq!(bits(&new(1., generator(1))?.forward_t(&x, false)?)?, bits(&x)?, "{name} at 1");
        for drop_p in [-0.1, 1.1, f64::NAN] {
            let error = new(drop_p, generator(1)).err().expect(name).to_string();
            assert!(
                error.contains("drop_p: expected a probability of dropping in [0, 1]"),
                "{error}"
            );
        }
    }
    Ok(())
}

#[test]
fn groups_drop_as_a_whole_at_the_realised_rate() -> Result<()> {
    for (_, new, dims, len) in LAYERS.iter().filter(|(.., len)| *len > 0) {
        for drop_p in [0.05, 0.3, 0.5, 0.9] {
            drops_groups(&new(drop_p, generator(5))?.forward_t(&ones(dims)?, true)?, *len, drop_p)?;
        }
    }
    let locked = LockedDropout::new(0.3, generator(5))?;
    let y = locked.forward(&ones(&[40, 3, 50])?, true)?;
    drops_groups(&y.transpose(1, 2)?.contiguous()?, 3, 0.3)?;
    let time_first = LockedDropout::new(0.3, generator(5))?.with_time_first();
    let of_time = time_first.forward(&ones(&[3, 40, 50])?, true)?;
    assert_eq!(bits(&of_time.transpose(0, 1)?.contiguous()?)?, bits(&y)?, "the same mask");
    // Keras' cases: ones of (20, 500) at a half; the noise shape (20, 1, 10).
    let half = Dropout::with_generator(0.5, generator(5))?.forward(&ones(&[20, 500])?, true)?;
    drops_groups(&half, 1, 0.5)?;
    let noise = BroadcastDropout::new(0.5, &[Some(20), Some(1), Some(10)], generator(5))?;
    let y = noise.forward(&ones(&[20, 3, 10])?, true)?;
    drops_groups(&y.transpose(1, 2)?.contiguous()?, 3, 0.5)?;
    Ok(())
}

/// A sample without a batch is a batch of one.
#[test]
fn unbatched_equals_batched() -> Result<()> {
    type Of = fn(&Tensor, Arc<MaskGenerator>) -> Result<Tensor>;
    let layers: [(Of, &[usize]); 3] = [
        (|x, g| Dropout1d::new(0.5, g)?.forward(x, true), &[1, 40, 2]),
        (|x, g| Dropout2d::new(0.5, g)?.forward(x, true), &[1, 40, 2, 2]),
        (|x, g| Dropout3d::new(0.5, g)?.forward(x, true), &[1, 40, 2, 2, 2]),
    ];
    for (forward, dims) in layers {
        let x = random(dims, DType::F32, 9)?;
        let alone = forward(&x.squeeze(0)?, generator(2))?;
        assert_eq!(bits(&alone)?, bits(&forward(&x, generator(2))?)?);
    }
    Ok(())
}

/// PyTorch's 24 permutations and 4 offsets: how a tensor lies in memory changes nothing.
#[test]
fn strides_and_offsets_change_nothing() -> Result<()> {
    let dims = [3, 4, 5, 2];
    let mut orders = Vec::new();
    for order in 0..256usize {
        let order = [order % 4, order / 4 % 4, order / 16 % 4, order / 64];
        if (0..4).all(|d| order.contains(&d)) {
            orders.push(order);
        }
    }
    assert_eq!(orders.len(), 24);
    let x = random(&dims, DType::F32, 4)?;
    let expected = bits(&Dropout2d::new(0.5, generator(3))?.forward(&x, true)?)?;
    for order in orders {
        let mut back = [0; 4];
        order.iter().enumerate().for_each(|(at, d)| back[*d] = at);
        for offset in 0..4 {
            let moved = x.permute(order)?.contiguous()?.flatten_all()?;
            let padded =
                Tensor::cat(&[&Tensor::zeros(offset, DType::F32, &Device::Cpu)?, &moved], 0)?;
            let lying = padded.narrow(0, offset, moved.elem_count())?;
            let lying = lying.reshape(order.map(|d| dims[d]).to_vec())?.permute(back)?;
            let y = Dropout2d::new(0.5, generator(3))?.forward(&lying, true)?;
            assert_eq!(bits(&y)?, expected, "{order:?} from {offset}");
        }
    }
    Ok(())
}

/// Klambauer et al.: of a standard normal input mean 0 and variance 1 stay, and its channels as well.
#[test]
fn alpha_dropout_keeps_mean_and_variance() -> Result<()> {
    const N: usize = 200_000;
    let x = Tensor::from_vec(standard_normal(N), (N / 4, 4), &Device::Cpu)?;
    for drop_p in [0.05, 0.1, 0.5, 0.8] {
        let y = AlphaDropout::new(drop_p, generator(6))?.forward(&x, true)?;
        let (mean, variance) = moments(&floats(&y)?);
        assert!(mean.abs() < SIGMAS / (N as f64).sqrt(), "{drop_p}: mean {mean}");
        // The fourth moment of a mixture of a scaled normal and a constant.
        let fourth = moments(&floats(&(&y - mean)?.powf(4.)?)?).0;
        let bound = SIGMAS * ((fourth - 1.) / N as f64).sqrt();
        assert!((variance - 1.).abs() < bound, "{drop_p}: variance {variance}, bound {bound}");

        // Channels of one element are elements.
        let features = FeatureAlphaDropout::new(drop_p, generator(6))?.forward(&x, true)?;
        assert_eq!(bits(&features)?, bits(&y)?);
    }
    Ok(())
}

/// Standard normal numbers, by Box and Muller.
fn standard_normal(n: usize) -> Vec<f32> {
    let uniform = |seed| -> Vec<f64> {
        let x = random(&[n], DType::F64, seed).unwrap();
        x.to_vec1::<f64>().unwrap().into_iter().map(|x| (x + 2.) / 4.).collect()
    };
    let pairs = uniform(1).into_iter().zip(uniform(2));
    pairs
        .map(|(u, v)| ((-2. * (1. - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32)
        .collect()
}

#[test]
fn a_word_drops_wherever_it_occurs() -> Result<()> {
    let (layer, words) = (EmbeddingDropout::new(0.3, generator(8))?, 2000u32);
    let ids: Vec<u32> = (0..3 * words).map(|i| i * 7 % words).collect();
    let ids = Tensor::from_vec(ids.clone(), (3, words as usize), &Device::Cpu)?;
    let y = layer.forward(&ones(&[3, words as usize, 4])?, &ids, true)?;
    drops_groups(&sorted_by_word(&y, &ids)?, 12, 0.3)?;
    let as_i64 = EmbeddingDropout::new(0.3, generator(8))?;
    let as_i64 =
        as_i64.forward(&ones(&[3, words as usize, 4])?, &ids.to_dtype(DType::I64)?, true)?;
    assert_eq!(bits(&as_i64)?, bits(&y)?);
    Ok(())
}

fn sorted_by_word(embedded: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let ids = ids.flatten_all()?.to_vec1::<u32>()?;
    let mut places: Vec<u32> = (0..ids.len() as u32).collect();
    places.sort_by_key(|place| ids[*place as usize]);
    let places = Tensor::from_vec(places, ids.len(), &Device::Cpu)?;
    embedded.flatten(0, 1)?.index_select(&places, 0)
}

#[test]
fn layer_drop_skips_layers_without_computing_them() -> Result<()> {
    let (x, n) = (ones(&[2])?, 4000);
    let layer_drop = LayerDrop::new(0.2, generator(4))?;
    let mut calls = 0f64;
    for _ in 0..n {
        let y = layer_drop.forward(&x, true, |x| {
            calls += 1.;
            x * 3.
        })?;
        assert!([1., 3.].contains(&y.to_vec1::<f32>()?[0]), "skipped or computed, and not scaled");
    }
    let keep_p = (0.8f64 * 65536.).round() / 65536.;
    let z = (calls - n as f64 * keep_p) / (n as f64 * keep_p * (1. - keep_p)).sqrt();
    assert!(z.abs() < SIGMAS, "{calls} of {n}: {z} sigma");
    let y = layer_drop.forward(&x, false, |x| x * 3.)?;
    assert_eq!(y.to_vec1::<f32>()?, [3., 3.], "in evaluation all are computed");
    let skipped = LayerDrop::new(1., generator(4))?;
    assert_eq!(
        skipped.forward(&x, true, |_| candle_core::bail!("computed"))?.to_vec1::<f32>()?,
        [1., 1.]
    );
    assert_eq!(LayerDrop::every_other(4, 0.5)?, [0, 2]);
    assert_eq!(LayerDrop::every_other(6, 0.4)?, [0, 2, 4], "floor of 2.5");
    assert!(LayerDrop::every_other(4, -0.5).is_err());
    assert_eq!(LayerDrop::every_other(3, 0.)?, [0, 1, 2], "at no rate nothing is cut");
    Ok(())
}
