//! Passes of layers and models.

use std::sync::Arc;

use candle_core::{DType, Device, ModuleT, Result, Tensor};
use candle_dropout::functional::{StochasticDepth, column_sums, drop_path, dropout};
use candle_dropout::{
    AlphaDropout, BroadcastDropout, Cutout, DropBlock2d, DropHead, DropMask, DropPath, Dropout,
    Dropout1d, EmbeddingDropout, FeatureAlphaDropout, LayerDrop, LockedDropout, Lstm,
    MaskGenerator, MaskKey, McDropout, McPrediction, MultiHeadAttention, MultiHeadAttentionConfig,
    MultiSampleDropout, RecurrentDropout, TokenDropout, Transformer, TransformerConfig,
    seeded_var_builder,
};
use candle_nn::VarMap;
use cases::runner::same_bits;
use cases::{bits, random};

use crate::{SEED, generator, key, message};

#[test]
fn what_mixes_samples_is_refused() -> Result<()> {
    let (x, layer) = (random(&[2, 6], DType::F32, 1)?, Dropout::new(0.5));
    let mc = McDropout::new(3, SEED)?;
    let refused = |model: &dyn Fn(&Tensor, &DropMask) -> Result<Tensor>| {
        message(mc.predict(&x, 0, |xs, train| model(xs, &layer.next_mask(train)?)))
    };
    let sums = refused(&column_sums);
    assert!(sums.starts_with("column_sums: drop: expected the mask of one pass, got"), "{sums}");
    let transposed = refused(&|xs, drop| dropout(&xs.narrow(0, 0, 5)?, drop));
    let expected = "dropout: x: expected a first dimension that is a multiple of 3 passes of 2 samples, got [5, 6]";
    assert!(transposed.starts_with(expected), "{transposed}");
    let scalar = refused(&|xs, drop| drop_path(&xs.sum_all()?, StochasticDepth::Batch, drop));
    assert!(scalar.starts_with("drop_path: x: expected a first dimension"), "{scalar}");
    let window = refused(&|xs, drop| dropout(xs, &drop.window(&[6, 6], &[0, 0])));
    assert!(window.starts_with("dropout: drop.window: expected none in"), "{window}");
    let lost = refused(&|xs, _| xs.narrow(0, 0, 4));
    assert!(
        lost.starts_with("mc_dropout: model: expected a result for each of 3 passes of 2 samples"),
        "{lost}"
    );

    assert!(message(McDropout::new(0, 1)).starts_with("mc_dropout: samples: expected at least 1"));
    for dims in [&[0, 3][..], &[]] {
        let x = Tensor::zeros(dims, DType::F32, &Device::Cpu)?;
        let error = message(mc.predict(&x, 0, |xs, _| Ok(xs.clone())));
        assert!(error.starts_with("mc_dropout: x: expected [B, ..] with at least one"), "{error}");
    }
    let prediction = mc.predict(&x, 0, |xs, _| Ok(xs.clone()))?;
    for t in [0, 4] {
        let error = message(prediction.prefix(t));
        assert!(error.starts_with("mc_dropout: prefix: expected 1 to 3 passes, got"), "{error}");
    }
    let numbers = mc.predict(&x, 0, |xs, _| xs.sum(1))?;
    let error = message(numbers.predictive_entropy());
    assert!(
        error.starts_with("mc_dropout: samples: expected logits [T, B, .., classes]"),
        "{error}"
    );
    let classes = mc.predict(&x, 0, |xs, _| xs.argmax(1))?;
    assert!(message(classes.mean()).starts_with("mc_dropout: samples: expected dtype f32"));
    Ok(())
}

type Model = Box<dyn Fn(&Tensor, bool) -> Result<Tensor>>;

/// A layer or model, its input of `n` samples, and whether it gives a row of any batch the same bits: matrix products
/// need not.
struct Row {
    name: &'static str,
    x: fn(n: usize) -> Result<Tensor>,
    model: Model,
    same_bits: bool,
}

fn numbers(n: usize) -> Result<Tensor> {
    random(&[n, 5, 8], DType::F32, 3)
}

fn tokens(n: usize) -> Result<Tensor> {
    (random(&[n, 6], DType::F32, 4)?.abs()? * 8.)?.to_dtype(DType::U32)
}

fn transformer(fused: bool) -> Result<Transformer> {
    let config = TransformerConfig {
        vocab_size: 17,
        max_position_embeddings: 6,
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        drop_path_rate: 0.3,
        fused,
        ..TransformerConfig::gpt2()
    };
    let vb = seeded_var_builder(&VarMap::new(), 1, DType::F32, &Device::Cpu);
    Transformer::new(&config, generator(), vb)
}

/// Masks that are shared over dimensions, or by words.
fn shared_rows() -> Result<Vec<Row>> {
    let generator = Arc::new(MaskGenerator::new(1));
    let new = || generator.clone();
    let row = |name, model: Model| Row { name, x: numbers, model, same_bits: true };
    let of = |name, layer: Box<dyn ModuleT>| {
        row(name, Box::new(move |xs, train| layer.forward_t(xs, train)))
    };
    let time_first = LockedDropout::new(0.5, new())?.with_time_first();
    let (heads, words) = (DropHead::new(0.5, new())?, EmbeddingDropout::new(0.5, new())?);
    let image = |layer: Box<dyn ModuleT>| -> Model {
        Box::new(move |xs, train| {
            layer.forward_t(&xs.reshape(((), 1, 5, 8))?, train)?.reshape(xs.shape())
        })
    };
    let layer_drop = LayerDrop::new(0.5, new())?;
    let by_column = BroadcastDropout::new(0.5, &[Some(1), None, None], new())?;
    Ok(vec![
        of("dropout1d", Box::new(Dropout1d::new(0.5, new())?)),
        of("locked_dropout", Box::new(LockedDropout::new(0.5, new())?)),
        of("token_dropout", Box::new(TokenDropout::new(0.5, new())?)),
        of("alpha_dropout", Box::new(AlphaDropout::new(0.5, new())?)),
        of("feature_alpha_dropout", Box::new(FeatureAlphaDropout::new(0.5, new())?)),
        of("broadcast_dropout over samples", Box::new(by_column)),
        row("cutout", image(Box::new(Cutout::new(3, new())?))),
        row("drop_block", image(Box::new(DropBlock2d::new(0.3, new())?))),
        row(
            "locked_dropout, time first",
            Box::new(move |xs, train| {
                time_first.forward(&xs.transpose(0, 1)?, train)?.transpose(0, 1)?.contiguous()
            }),
        ),
        row(
            "drop_head",
            Box::new(move |xs, train| {
                heads.forward(&xs.reshape(((), 5, 2, 4))?, train)?.reshape(xs.shape())
            }),
        ),
        row(
            "embedding_dropout",
            Box::new(move |xs, train| {
                let ids = (xs.narrow(2, 0, 1)?.abs()? * 4.)?.to_dtype(DType::U32)?.squeeze(2)?;
                words.forward(xs, &ids, train)
            }),
        ),
        row("layer_drop", Box::new(move |xs, train| layer_drop.forward(xs, train, |xs| xs.sqr()))),
    ])
}

fn rows() -> Result<Vec<Row>> {
    let mut rows = shared_rows()?;
    rows.extend(own_rows()?);
    Ok(rows)
}

/// A decision for each element, or for each sample.
fn own_rows() -> Result<Vec<Row>> {
    let generator = Arc::new(MaskGenerator::new(1));
    let row = |name, same_bits, model: Model| Row { name, x: numbers, model, same_bits };
    let path =
        |mode| Ok::<_, candle_core::Error>(DropPath::new(0.5, generator.clone())?.with_mode(mode));
    let layer = Dropout::with_generator(0.3, generator.clone())?;
    let (by_sample, by_batch) = (path(StochasticDepth::Row)?, path(StochasticDepth::Batch)?);
    let (kept, inner) = (by_sample.clone(), layer.clone());
    let (added, flat) = (by_sample.clone(), layer.clone());
    let multi = MultiSampleDropout::new(0.5, 3, generator.clone())?;
    let vars = VarMap::new();
    let config = MultiHeadAttentionConfig {
        hidden_size: 8,
        num_heads: 2,
        drop_p: 0.4,
        ..Default::default()
    };
    let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
    let joint = MultiHeadAttention::new(&config, generator.clone(), vb.pp("joint"))?;
    let [q, k, v, o] = ["q", "k", "v", "o"].map(|name| vb.pp(name));
    let apart = MultiHeadAttention::from_qkv(&config, generator.clone(), [q, k, v], o)?;
    let (fused, unfused) = (transformer(true)?, transformer(false)?);
    Ok(vec![
        row("dropout", true, Box::new(move |xs, train| layer.forward(xs, train))),
        row(
            "dropout, flattened",
            true,
            Box::new(move |xs, train| flat.forward(&xs.flatten(0, 1)?, train)?.reshape(xs.shape())),
        ),
        row("drop_path", true, Box::new(move |xs, train| by_sample.forward(xs, train))),
        row("drop_path by batch", true, Box::new(move |xs, train| by_batch.forward(xs, train))),
        row("drop_path added", true, Box::new(move |xs, train| added.forward_add(xs, xs, train))),
        row(
            "drop_path kept",
            true,
            Box::new(move |xs, train| {
                kept.forward_kept(xs, xs, train, |xs| inner.forward(xs, train))
            }),
        ),
        row(
            "multi_sample_dropout",
            true,
            Box::new(move |xs, train| multi.forward(xs, train, |x| x.sqr())),
        ),
        row("attention", false, Box::new(move |xs, train| joint.forward(xs, train))),
        row("attention, apart", false, Box::new(move |xs, train| apart.forward(xs, train))),
        Row {
            x: tokens,
            ..row("transformer", false, Box::new(move |xs, train| fused.forward(xs, train)))
        },
        Row {
            x: tokens,
            ..row(
                "transformer, unfused",
                false,
                Box::new(move |xs, train| unfused.forward(xs, train)),
            )
        },
    ])
}

impl Row {
    fn predict(&self, times: usize, x: &Tensor, first: usize) -> Result<McPrediction> {
        McDropout::new(times, SEED)?.predict(x, first, &self.model)
    }

    fn assert_same(&self, a: &Tensor, b: &Tensor, what: &str) -> Result<()> {
        if self.same_bits {
            return same_bits(a, b, what);
        }
        let worst = (a - b)?.abs()?.max_all()?.to_scalar::<f32>()?;
        let largest = b.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(worst <= 1e-5 * largest.max(1.), "{what}: {worst} of {largest}");
        Ok(())
    }
}

#[test]
fn a_sample_has_the_same_passes_in_any_batch() -> Result<()> {
    for row in rows()? {
        let x = (row.x)(7)?;
        let whole = row.predict(5, &x, 0)?;
        for sizes in [&[7][..], &[1, 6], &[3, 3, 1], &[4, 2, 1], &[1; 7]] {
            let mut first = 0;
            for &size in sizes {
                let some = row.predict(5, &x.narrow(0, first, size)?, first)?;
                let what = format!("{}: {size} samples from {first} on", row.name);
                let expected = whole.samples().narrow(1, first, size)?;
                row.assert_same(some.samples(), &expected, &what)?;
                row.assert_same(&some.mean()?, &whole.mean()?.narrow(0, first, size)?, &what)?;
                row.assert_same(
                    &some.variance()?,
                    &whole.variance()?.narrow(0, first, size)?,
                    &what,
                )?;
                first += size;
            }
            assert_eq!(first, 7);
        }
        // Dropout is there at all, and passes and samples differ.
        assert!(whole.variance()?.max_all()?.to_scalar::<f32>()? > 0., "{}", row.name);
    }
    Ok(())
}

#[test]
fn the_first_passes_of_many_are_those_of_few() -> Result<()> {
    for row in rows()? {
        let x = (row.x)(2)?;
        let many = row.predict(8, &x, 3)?;
        for t in [1, 2, 5, 8] {
            let (few, prefix) = (row.predict(t, &x, 3)?, many.prefix(t)?);
            let what = format!("{}: {t} passes", row.name);
            row.assert_same(few.samples(), prefix.samples(), &what)?;
            row.assert_same(&few.mean()?, &prefix.mean()?, &what)?;
            row.assert_same(&few.variance()?, &prefix.variance()?, &what)?;
            row.assert_same(&few.predictive_entropy()?, &prefix.predictive_entropy()?, &what)?;
            row.assert_same(&few.mutual_information()?, &prefix.mutual_information()?, &what)?;
        }
    }
    Ok(())
}

#[test]
fn predictions_repeat_and_leave_generators_alone() -> Result<()> {
    let generator = generator();
    let layer = Dropout::with_generator(0.5, generator.clone())?;
    let (mc, x) = (McDropout::new(4, SEED)?, random(&[3, 8], DType::F32, 1)?);
    generator.next_key();
    let state = generator.state();
    let predict =
        || mc.predict(&x, 0, |xs, train| layer.forward(&layer.forward(xs, train)?, train));
    let (first, second) = (predict()?, predict()?);
    assert_eq!(bits(first.samples())?, bits(second.samples())?);
    assert_eq!(generator.state(), state);
    // Two sites, two keys.
    let drop = |n, t| DropMask::new(0.5, key(n, t));
    for t in 0..4 {
        let plain = dropout(&dropout(&x, &drop(0, t)?)?, &drop(1, t)?)?;
        same_bits(&first.samples().get(t)?, &plain, "pass")?;
    }
    assert_ne!(
        bits(first.samples())?,
        bits(
            McDropout::new(4, SEED + 1)?
                .predict(&x, 0, |xs, train| { layer.forward(&layer.forward(xs, train)?, train) })?
                .samples()
        )?
    );
    // In evaluation nothing is drawn.
    let same = mc.predict(&x, 0, |xs, _| layer.forward(xs, false))?;
    same_bits(&same.samples().get(3)?, &x, "evaluation")?;
    assert_eq!(bits(&same.variance()?)?, [0; 24]);
    Ok(())
}

#[test]
fn errors_panics_and_other_threads_leave_nothing_behind() -> Result<()> {
    let (generator, x) = (generator(), random(&[3, 8], DType::F32, 1)?);
    let layer = Dropout::with_generator(0.5, generator.clone())?;
    let mc = McDropout::new(4, SEED)?;
    let is_plain = |counter| -> Result<()> {
        let plain = dropout(&x, &DropMask::new(0.5, MaskKey::derive(1, counter))?)?;
        same_bits(&layer.forward(&x, true)?, &plain, "a layer outside")
    };
    is_plain(0)?;
    assert!(mc.predict(&x, 0, |_, _| candle_core::bail!("of a model")).is_err());
    is_plain(1)?;
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        mc.predict(&x, 0, |_, _| panic!("of a model"))
    }));
    assert!(panic.is_err());
    is_plain(2)?;
    mc.predict(&x, 0, |xs, train| {
        std::thread::scope(|scope| scope.spawn(|| is_plain(3).expect("another thread")).join())
            .expect("no panic");
        // Inside the batch is that of the outer passes, three samples four times.
        let inner = McDropout::new(2, 5)?.predict(xs, 0, |xs, train| layer.forward(xs, train))?;
        let alone = dropout(xs, &DropMask::new(0.5, MaskKey::derive(5, 0).draw(1))?)?;
        same_bits(&inner.samples().get(1)?, &alone, "nested")?;
        let outer = layer.forward(xs, train)?;
        same_bits(
            &outer.narrow(0, 3, 3)?,
            &dropout(&x, &DropMask::new(0.5, key(0, 1))?)?,
            "outer",
        )?;
        Ok(outer)
    })?;
    is_plain(4)
}

/// Gal's own use: a variational LSTM, of which each pass is a network; masks of steps cannot be found in a batch that
/// is repeated, and say so.
#[test]
fn a_recurrent_layer_with_a_mask_a_sequence_has_passes_and_one_of_steps_is_refused() -> Result<()> {
    let lstm = |dropout| {
        let vb = seeded_var_builder(&VarMap::new(), 1, DType::F32, &Device::Cpu);
        Lstm::new(5, 6, Default::default(), dropout, generator(), vb)
    };
    let variational = lstm(RecurrentDropout::Variational { input_p: 0.5, state_p: 0.5 })?;
    let mc = McDropout::new(3, SEED)?;
    let x = random(&[4, 7, 5], DType::F32, 3)?;
    let all = mc.predict(&x, 0, |xs, train| variational.forward(xs, train))?;
    assert_ne!(bits(&all.samples().get(0)?)?, bits(&all.samples().get(1)?)?);
    for sample in 0..4 {
        let alone = x.narrow(0, sample, 1)?;
        let alone = mc.predict(&alone, sample, |xs, train| variational.forward(xs, train))?;
        let of_all = all.samples().narrow(1, sample, 1)?;
        // Candle's products round differently for one row.
        let distance = (alone.samples() - of_all)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(distance < 1e-5, "sample {sample}: {distance}");
    }
    let zoneout = lstm(RecurrentDropout::Zoneout { cell_p: 0.5, state_p: 0.5 })?;
    let error = mc.predict(&x, 0, |xs, train| zoneout.forward(xs, train)).map(|_| ()).unwrap_err();
    assert!(
        error.to_string().contains("drop.window: expected none in Monte-Carlo passes"),
        "{error}"
    );
    Ok(())
}
