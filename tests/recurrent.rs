//! `Lstm` and `Gru`: candle's where nothing is dropped, and otherwise the papers' formulas with the masks of the law.
//!
//! One text, since all its facts are about the same steps of the two cells, which it writes out once.

use std::sync::Arc;

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_dropout::{
    DropMask, Gru, Lstm, MaskGenerator, MaskPer, RecurrentDropout, RecurrentMasks, Zoneout,
    compose, seeded_var_builder,
};
use candle_nn::ops::sigmoid;
use candle_nn::rnn::{GRUConfig, GRUState, LSTMConfig, LSTMState, RNN};
use candle_nn::{Init, VarBuilder, VarMap};
use cases::{bits, error, largest, random};

const B: usize = 3;
const T: usize = 5;
const IN: usize = 4;
const HIDDEN: usize = 7;
const SEED: u64 = 11;

fn generator() -> Arc<MaskGenerator> {
    Arc::new(MaskGenerator::new(SEED))
}

/// Every kind, with rates that are not the same at its two sites.
const KINDS: [RecurrentDropout; 6] = [
    RecurrentDropout::None,
    RecurrentDropout::Variational { input_p: 0.3, state_p: 0.5 },
    RecurrentDropout::Naive { input_p: 0.3, state_p: 0.5 },
    RecurrentDropout::NoMemoryLoss { drop_p: 0.5, masks: MaskPer::Sequence },
    RecurrentDropout::NoMemoryLoss { drop_p: 0.5, masks: MaskPer::Step },
    RecurrentDropout::Zoneout { cell_p: 0.4, state_p: 0.2 },
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Cell {
    Lstm,
    Gru,
}

/// A layer of either kind, with states as pairs of which a GRU has no second.
enum Layer {
    Lstm(Lstm),
    Gru(Gru),
}

type State = (Tensor, Option<Tensor>);

impl Cell {
    const BOTH: [Self; 2] = [Self::Lstm, Self::Gru];

    /// The same kind for this cell: a GRU has no cell to leave as it was.
    fn takes(self, dropout: RecurrentDropout) -> RecurrentDropout {
        match (self, dropout) {
            (Self::Gru, RecurrentDropout::Zoneout { state_p, .. }) => {
                RecurrentDropout::Zoneout { cell_p: 0., state_p }
            }
            _ => dropout,
        }
    }

    fn layer(
        self,
        dropout: RecurrentDropout,
        generator: &Arc<MaskGenerator>,
        vb: VarBuilder,
    ) -> Result<Layer> {
        let (dropout, generator) = (self.takes(dropout), generator.clone());
        let bias = Some(Init::Randn { mean: 0., stdev: 0.3 });
        Ok(match self {
            Self::Lstm => {
                let config = LSTMConfig { b_ih_init: bias, b_hh_init: bias, ..Default::default() };
                Layer::Lstm(Lstm::new(IN, HIDDEN, config, dropout, generator, vb)?)
            }
            Self::Gru => {
                let config = GRUConfig { b_ih_init: bias, b_hh_init: bias, ..Default::default() };
                Layer::Gru(Gru::new(IN, HIDDEN, config, dropout, generator, vb)?)
            }
        })
    }
}

impl Layer {
    fn masks(&self, train: bool) -> Result<RecurrentMasks> {
        match self {
            Self::Lstm(layer) => layer.next_masks(train),
            Self::Gru(layer) => layer.next_masks(train),
        }
    }

    fn seq(&self, xs: &Tensor, state: &State, masks: &RecurrentMasks) -> Result<Vec<State>> {
        Ok(match self {
            Self::Lstm(layer) => {
                let state = LSTMState::new(state.0.clone(), state.1.clone().expect("a cell"));
                let states = layer.seq_masked(xs, &state, masks)?;
                states.into_iter().map(|s| (s.h, Some(s.c))).collect()
            }
            Self::Gru(layer) => {
                let states = layer.seq_masked(xs, &GRUState { h: state.0.clone() }, masks)?;
                states.into_iter().map(|s| (s.h, None)).collect()
            }
        })
    }

    fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        match self {
            Self::Lstm(layer) => layer.forward(xs, train),
            Self::Gru(layer) => layer.forward(xs, train),
        }
    }
}

/// All states, and cells beside them: `[B, T, HIDDEN]` or twice as wide.
fn tensor_of(states: &[State]) -> Result<Tensor> {
    let stack = |part: fn(&State) -> Option<Tensor>| -> Result<Option<Tensor>> {
        let parts: Vec<_> = states.iter().filter_map(part).collect();
        (!parts.is_empty()).then(|| Tensor::stack(&parts, 1)).transpose()
    };
    let (h, c) = (stack(|s| Some(s.0.clone()))?, stack(|s| s.1.clone())?);
    Tensor::cat(&[h, c].into_iter().flatten().collect::<Vec<_>>(), 2)
}

fn state_of(cell: Cell, dtype: DType) -> Result<State> {
    let h = random(&[B, HIDDEN], dtype, 2)?;
    let c = (cell == Cell::Lstm).then(|| random(&[B, HIDDEN], dtype, 3)).transpose()?;
    Ok((h, c))
}

// ---- the formulas ----

/// The masks that a kind has by the law, over all steps: u8, `[T, B, C]`, and the scale of what is kept.
#[derive(Default)]
struct Expected {
    input: Option<(Tensor, f64)>,
    state: Option<(Tensor, f64)>,
    candidate: Option<(Tensor, f64)>,
    cell: Option<(Tensor, f64)>,
    new_state: Option<(Tensor, f64)>,
}

impl Expected {
    /// One key for each site, in the order of the fields.
    fn new(cell: Cell, dropout: RecurrentDropout) -> Result<Self> {
        let generator = MaskGenerator::new(SEED);
        let mask = |per: MaskPer, drop_p: f64, cols: usize| -> Result<Option<(Tensor, f64)>> {
            let drop = DropMask::new(drop_p, generator.next_key())?;
            let keep = match per {
                MaskPer::Sequence => drop.to_tensor((1, B, cols), &Device::Cpu)?,
                MaskPer::Step => drop.to_tensor((T, B, cols), &Device::Cpu)?,
            };
            let keep = keep.broadcast_as((T, B, cols))?.contiguous()?;
            Ok(Some((keep, f64::from(drop.rate().scale()))))
        };
        Ok(match cell.takes(dropout) {
            RecurrentDropout::None => Self::default(),
            RecurrentDropout::Variational { input_p, state_p } => Self {
                input: mask(MaskPer::Sequence, input_p, IN)?,
                state: mask(MaskPer::Sequence, state_p, HIDDEN)?,
                ..Self::default()
            },
            RecurrentDropout::Naive { input_p, state_p } => Self {
                input: mask(MaskPer::Step, input_p, IN)?,
                state: mask(MaskPer::Step, state_p, HIDDEN)?,
                ..Self::default()
            },
            RecurrentDropout::NoMemoryLoss { drop_p, masks } => {
                Self { candidate: mask(masks, drop_p, HIDDEN)?, ..Self::default() }
            }
            RecurrentDropout::Zoneout { cell_p, state_p } => Self {
                cell: match cell {
                    Cell::Lstm => mask(MaskPer::Step, cell_p, HIDDEN)?,
                    Cell::Gru => None,
                },
                new_state: mask(MaskPer::Step, state_p, HIDDEN)?,
                ..Self::default()
            },
        })
    }
}

fn dropped(mask: &Option<(Tensor, f64)>, t: usize, x: &Tensor) -> Result<Tensor> {
    let Some((keep, scale)) = mask else { return Ok(x.clone()) };
    x * (keep.get(t)?.to_dtype(x.dtype())? * *scale)?
}

fn zoned(mask: &Option<(Tensor, f64)>, t: usize, new: &Tensor, old: &Tensor) -> Result<Tensor> {
    let Some((keep, _)) = mask else { return Ok(new.clone()) };
    let keep = keep.get(t)?.to_dtype(new.dtype())?;
    let stay = (1. - &keep)?;
    (keep * new)? + (stay * old)?
}

/// As the papers write it, from candle's ops, a step at a time.
fn formula(
    cell: Cell,
    vb: &VarBuilder,
    xs: &Tensor,
    state: &State,
    masks: &Expected,
) -> Result<Vec<State>> {
    let gates = if cell == Cell::Lstm { 4 } else { 3 };
    let (w, u) = (
        vb.get((gates * HIDDEN, IN), "weight_ih_l0")?.t()?,
        vb.get((gates * HIDDEN, HIDDEN), "weight_hh_l0")?.t()?,
    );
    let [b, v] =
        ["bias_ih_l0", "bias_hh_l0"].map(|name| vb.get(gates * HIDDEN, name).expect("a bias"));
    let (mut state, mut states) = (state.clone(), Vec::new());
    for t in 0..T {
        let x = dropped(&masks.input, t, &xs.narrow(1, t, 1)?.squeeze(1)?)?;
        let of_x = x.matmul(&w)?.broadcast_add(&b)?.chunk(gates, 1)?;
        let h = dropped(&masks.state, t, &state.0)?;
        let of_h = h.matmul(&u)?.broadcast_add(&v)?.chunk(gates, 1)?;
        let gate = |at: usize| &of_x[at] + &of_h[at];
        state = match &state.1 {
            Some(old_c) => {
                let [i, f, o] = [sigmoid(&gate(0)?)?, sigmoid(&gate(1)?)?, sigmoid(&gate(3)?)?];
                let g = dropped(&masks.candidate, t, &gate(2)?.tanh()?)?;
                let c = ((f * old_c)? + (i * g)?)?;
                let h = (o * c.tanh()?)?;
                let h = zoned(&masks.new_state, t, &h, &state.0)?;
                (h, Some(zoned(&masks.cell, t, &c, old_c)?))
            }
            None => {
                let [r, z] = [sigmoid(&gate(0)?)?, sigmoid(&gate(1)?)?];
                let n = (&of_x[2] + (r * &of_h[2])?)?.tanh()?;
                let n = dropped(&masks.candidate, t, &n)?;
                let h = ((&z * &state.0)? + ((1. - &z)? * n)?)?;
                (zoned(&masks.new_state, t, &h, &state.0)?, None)
            }
        };
        states.push(state.clone());
    }
    Ok(states)
}

/// Output and gradients, of the input, the state and every variable by name, of a weighted sum of all states.
fn results(
    cell: Cell,
    vars: &VarMap,
    states: impl Fn(&Tensor, &State) -> Result<Vec<State>>,
) -> Result<Vec<(String, Tensor)>> {
    let xs = Var::from_tensor(&random(&[B, T, IN], DType::F64, 1)?)?;
    let (h, c) = state_of(cell, DType::F64)?;
    let h = Var::from_tensor(&h)?;
    let c = c.map(|c| Var::from_tensor(&c)).transpose()?;
    let state = (h.as_tensor().clone(), c.as_ref().map(|c| c.as_tensor().clone()));
    let y = tensor_of(&states(&xs, &state)?)?;
    let grads = (&y * random(y.dims(), DType::F64, 4)?)?.backward()?;
    let mut inputs = vec![("xs".to_string(), xs), ("h".to_string(), h)];
    inputs.extend(c.map(|c| ("c".to_string(), c)));
    inputs
        .extend(vars.data().lock().unwrap().iter().map(|(name, var)| (name.clone(), var.clone())));
    inputs.sort_by(|a, b| a.0.cmp(&b.0));
    let mut results = vec![("y".to_string(), y)];
    for (name, var) in inputs {
        let grad = grads.get(&var).unwrap_or_else(|| panic!("{name} has no gradient")).clone();
        results.push((name, grad));
    }
    Ok(results)
}

#[track_caller]
fn assert_close(
    ours: &[(String, Tensor)],
    expected: &[(String, Tensor)],
    what: &str,
) -> Result<()> {
    assert_eq!(ours.len(), expected.len());
    for ((name, ours), (_, expected)) in ours.iter().zip(expected) {
        let off = error(ours, expected)?;
        assert!(off <= 1e-12 * largest(expected)?.max(1.), "{what}, {name}: off by {off:e}");
    }
    Ok(())
}

#[test]
fn every_kind_is_its_formula_with_the_masks_of_the_law_and_so_are_its_gradients() -> Result<()> {
    for cell in Cell::BOTH {
        for dropout in KINDS {
            let vars = VarMap::new();
            let vb = seeded_var_builder(&vars, 5, DType::F64, &Device::Cpu);
            let run = |xs: &Tensor, state: &State| {
                let layer = cell.layer(dropout, &generator(), vb.clone())?;
                layer.seq(xs, state, &layer.masks(true)?)
            };
            let ours = results(cell, &vars, run)?;
            let expected = Expected::new(cell, dropout)?;
            let formula =
                results(cell, &vars, |xs, state| formula(cell, &vb, xs, state, &expected))?;
            assert_eq!(formula.len(), if cell == Cell::Lstm { 8 } else { 7 });
            assert_close(&ours, &formula, &format!("{cell:?} {dropout:?}"))?;

            // Composed of candle's ops, and in a second backward, too.
            let composed = {
                let _composed = compose();
                results(cell, &vars, run)?
            };
            assert_close(&composed, &formula, &format!("composed {cell:?} {dropout:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn a_part_of_the_states_gives_its_gradients_and_again() -> Result<()> {
    for cell in Cell::BOTH {
        let vb = seeded_var_builder(&VarMap::new(), 5, DType::F64, &Device::Cpu);
        let layer = cell.layer(KINDS[1], &generator(), vb.clone())?;
        let xs = Var::from_tensor(&random(&[B, T, IN], DType::F64, 1)?)?;
        let state = state_of(cell, DType::F64)?;
        let states = layer.seq(&xs, &state, &layer.masks(true)?)?;
        let of_formula = formula(cell, &vb, &xs, &state, &Expected::new(cell, KINDS[1])?)?;
        // Early steps alone, then all, then early ones again: of one graph.
        for t in [1, T - 1, 0, 1] {
            let gradient = |states: &[State]| -> Result<Tensor> {
                Ok(states[t].0.sqr()?.backward()?.get(&xs).expect("a gradient").clone())
            };
            let (ours, expected) = (gradient(&states)?, gradient(&of_formula)?);
            assert!(error(&ours, &expected)? < 1e-12, "{cell:?}, step {t}");
            if t + 1 < T {
                let later = ours.narrow(1, t + 1, T - t - 1)?;
                assert_eq!(largest(&later)?, 0., "what comes later has no part in step {t}");
            }
        }
    }
    Ok(())
}

// ---- a drop-in for candle's ----

/// Candle's outputs, `[B, T, HIDDEN]`, with the variables of `vb`.
fn candles(cell: Cell, xs: &Tensor, vb: VarBuilder) -> Result<Tensor> {
    let hs: Vec<Tensor> = match cell {
        Cell::Lstm => {
            let layer = candle_nn::lstm(IN, HIDDEN, LSTMConfig::default(), vb)?;
            layer.seq(xs)?.into_iter().map(|state| state.h).collect()
        }
        Cell::Gru => {
            let layer = candle_nn::gru(IN, HIDDEN, GRUConfig::default(), vb)?;
            layer.seq(xs)?.into_iter().map(|state| state.h).collect()
        }
    };
    Tensor::stack(&hs, 1)
}

#[test]
fn at_rates_of_0_and_in_evaluation_they_are_candles() -> Result<()> {
    let zero = [
        RecurrentDropout::None,
        RecurrentDropout::Variational { input_p: 0., state_p: 0. },
        RecurrentDropout::Naive { input_p: 0., state_p: 0. },
        RecurrentDropout::NoMemoryLoss { drop_p: 0., masks: MaskPer::Step },
        RecurrentDropout::Zoneout { cell_p: 0., state_p: 0. },
    ];
    for (dtype, epsilon) in [
        (DType::F32, f64::from(f32::EPSILON)),
        (DType::F64, f64::EPSILON),
        (DType::F16, 2f64.powi(-10)),
        (DType::BF16, 2f64.powi(-7)),
    ] {
        for cell in Cell::BOTH {
            let vb = seeded_var_builder(&VarMap::new(), 5, dtype, &Device::Cpu);
            let xs = random(&[B, T, IN], dtype, 1)?;
            // Ours first: it makes the biases, which candle finds.
            let calls = zero
                .iter()
                .map(|kind| (kind, true))
                .chain(KINDS[..5].iter().map(|kind| (kind, false)));
            for (kind, train) in calls {
                let ours = cell.layer(*kind, &generator(), vb.clone())?.forward(&xs, train)?;
                let theirs = candles(cell, &xs, vb.clone())?;
                let wide = |x: &Tensor| x.to_dtype(DType::F64);
                let off = error(&wide(&ours)?, &wide(&theirs)?)?;
                assert!(off <= 4. * epsilon, "{cell:?} {kind:?} {dtype:?}: off by {off:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn variables_have_candles_names_and_shapes() -> Result<()> {
    for cell in Cell::BOTH {
        let (ours, theirs) = (VarMap::new(), VarMap::new());
        let vb = |vars: &VarMap| seeded_var_builder(vars, 5, DType::F32, &Device::Cpu);
        let xs = random(&[B, T, IN], DType::F32, 1)?;
        cell.layer(RecurrentDropout::None, &generator(), vb(&ours).pp("rnn"))?;
        candles(cell, &xs, vb(&theirs).pp("rnn"))?;
        let shapes = |vars: &VarMap| {
            let vars = vars.data().lock().unwrap();
            let mut shapes: Vec<_> =
                vars.iter().map(|(name, var)| (name.clone(), var.dims().to_vec())).collect();
            shapes.sort();
            shapes
        };
        assert_eq!(shapes(&ours), shapes(&theirs));
    }
    // A second layer, backwards, without biases.
    let vars = VarMap::new();
    let vb = seeded_var_builder(&vars, 5, DType::F32, &Device::Cpu);
    let direction = candle_nn::rnn::Direction::Backward;
    let config = LSTMConfig { layer_idx: 1, direction, ..LSTMConfig::default_no_bias() };
    Lstm::new(IN, HIDDEN, config, RecurrentDropout::None, generator(), vb)?;
    let mut names: Vec<_> = vars.data().lock().unwrap().keys().cloned().collect();
    names.sort();
    assert_eq!(names, ["weight_hh_l1_reverse", "weight_ih_l1_reverse"]);
    Ok(())
}

// ---- parts of a sequence, keys ----

#[test]
fn a_sequence_and_a_batch_in_parts_have_the_masks_of_the_whole() -> Result<()> {
    for cell in Cell::BOTH {
        for dropout in KINDS {
            let vb = seeded_var_builder(&VarMap::new(), 5, DType::F64, &Device::Cpu);
            let layer = cell.layer(dropout, &generator(), vb)?;
            let (xs, state) = (random(&[B, T, IN], DType::F64, 1)?, state_of(cell, DType::F64)?);
            let masks = layer.masks(true)?;
            let whole = tensor_of(&layer.seq(&xs, &state, &masks)?)?;
            let mut rows = Vec::new();
            for (first, samples) in [(0, 1), (1, 2)] {
                let part = |x: &Tensor| x.narrow(0, first, samples);
                let xs = part(&xs)?;
                let mut state = (part(&state.0)?, state.1.as_ref().map(part).transpose()?);
                let mut states = Vec::new();
                for (start, steps) in [(0, 2), (2, 1), (3, 2)] {
                    let masks = masks.window(B, first, start);
                    states.extend(layer.seq(&xs.narrow(1, start, steps)?, &state, &masks)?);
                    state = states.last().expect("a step").clone();
                }
                rows.push(tensor_of(&states)?);
            }
            let parts = Tensor::cat(&rows, 0)?;
            assert!(error(&parts, &whole)? < 1e-14, "{cell:?} {dropout:?}");
        }
    }
    Ok(())
}

#[test]
fn a_call_draws_a_key_a_site_in_training_whatever_the_rates_and_none_in_evaluation() -> Result<()> {
    let zero = RecurrentDropout::Variational { input_p: 0., state_p: 0. };
    for cell in Cell::BOTH {
        let of_zoneout = if cell == Cell::Lstm { 2 } else { 1 };
        for (dropout, keys) in KINDS.into_iter().zip([0, 2, 2, 1, 1, of_zoneout]).chain([(zero, 2)])
        {
            let generator = generator();
            let vb = seeded_var_builder(&VarMap::new(), 5, DType::F32, &Device::Cpu);
            let layer = cell.layer(dropout, &generator, vb)?;
            let xs = random(&[B, T, IN], DType::F32, 1)?;
            layer.forward(&xs, false)?;
            assert_eq!(generator.state().counter, 0, "{cell:?} {dropout:?}");
            layer.forward(&xs, true)?;
            assert_eq!(generator.state().counter, keys, "{cell:?} {dropout:?}");
            assert_eq!(bits(&layer.forward(&xs, false)?)?, bits(&layer.forward(&xs, false)?)?);
        }
    }
    Ok(())
}

// ---- what is dropped, and how often ----

/// A GRU whose states are 0 as long as their candidates are dropped.
fn first_states(masks: MaskPer, drop_p: f64, batch: usize, steps: usize) -> Result<Vec<Tensor>> {
    let vb = seeded_var_builder(&VarMap::new(), 5, DType::F32, &Device::Cpu);
    let dropout = RecurrentDropout::NoMemoryLoss { drop_p, masks };
    let layer = Gru::new(2, 16, GRUConfig::default(), dropout, generator(), vb)?;
    let xs = Tensor::ones((batch, steps, 2), DType::F32, &Device::Cpu)?;
    Ok(layer.seq(&xs, true)?.into_iter().map(|state| state.h).collect())
}

/// Which elements are 0.
fn zeros(x: &Tensor) -> Result<Vec<bool>> {
    Ok(x.flatten_all()?.to_vec1::<f32>()?.iter().map(|x| *x == 0.).collect())
}

#[track_caller]
fn assert_share(found: &[bool], p: f64, what: &str) {
    let (n, count) = (found.len() as f64, found.iter().filter(|found| **found).count() as f64);
    let z = (count - n * p) / (n * p * (1. - p)).sqrt();
    assert!(z.abs() < 5., "{what}: {count} of {n}, expected {p} of them: z = {z}");
}

#[test]
fn a_mask_a_sequence_is_the_same_at_each_step_and_one_a_step_is_not() -> Result<()> {
    const DROP_P: f64 = 0.25;
    let shared = first_states(MaskPer::Sequence, DROP_P, 512, 3)?;
    let first = zeros(&shared[0])?;
    assert_share(&first, DROP_P, "a mask a sequence");
    for h in &shared {
        assert_eq!(zeros(h)?, first, "what is dropped at the first step is dropped at all");
    }
    for (t, h) in first_states(MaskPer::Step, DROP_P, 512, 3)?.iter().enumerate() {
        let what = format!("masks a step, after {} of them", t + 1);
        assert_share(&zeros(h)?, DROP_P.powi(t as i32 + 1), &what);
    }
    Ok(())
}

#[test]
fn zoneout_leaves_its_share_of_a_state_and_evaluates_to_its_expectation() -> Result<()> {
    const DROP_P: f64 = 0.3;
    let layer = Zoneout::new(DROP_P, generator())?;
    let (new, old) = (random(&[40], DType::F64, 1)?, random(&[40], DType::F64, 2)?);
    let p = 1. - DropMask::new(DROP_P, generator().next_key())?.rate().keep_p();
    let expected = ((&new * (1. - p))? + (&old * p)?)?;
    assert!(error(&layer.forward(&new, &old, false)?, &expected)? < 1e-15);
    const N: usize = 4000;
    let wide = |x: &Tensor| x.broadcast_as((N, 40))?.contiguous();
    let y = layer.forward(&wide(&new)?, &wide(&old)?, true)?;
    let stays = y.eq(&wide(&old)?)?.flatten_all()?.to_vec1::<u8>()?;
    assert_share(&stays.iter().map(|stays| *stays == 1).collect::<Vec<_>>(), p, "zoneout");
    // The mean of N draws has a deviation of |new - old| sqrt(p (1 - p) / N).
    let off = (y.mean(0)? - &expected)?.abs()?;
    let sigma = ((&new - &old)?.abs()? * (p * (1. - p) / N as f64).sqrt())?;
    assert!((off / sigma)?.max_all()?.to_scalar::<f64>()? < 5.);

    for (drop_p, expected) in [(0., &new), (1., &old)] {
        let layer = Zoneout::new(drop_p, generator())?;
        for train in [true, false] {
            assert_eq!(bits(&layer.forward(&new, &old, train)?)?, bits(expected)?);
        }
    }
    Ok(())
}

#[test]
fn at_rates_of_1_a_state_stays_and_memory_is_not_lost() -> Result<()> {
    let xs = random(&[B, T, IN], DType::F64, 1)?;
    let vb = || seeded_var_builder(&VarMap::new(), 5, DType::F64, &Device::Cpu);
    let state = state_of(Cell::Lstm, DType::F64)?;
    let all = RecurrentDropout::Zoneout { cell_p: 1., state_p: 1. };
    for train in [true, false] {
        let layer = Cell::Lstm.layer(all, &generator(), vb())?;
        for (h, c) in layer.seq(&xs, &state, &layer.masks(train)?)? {
            assert_eq!(bits(&h)?, bits(&state.0)?);
            assert_eq!(bits(&c.expect("a cell"))?, bits(state.1.as_ref().expect("a cell"))?);
        }
    }
    // Without candidates a cell is multiplied by its forget gate, and keeps its sign.
    let none = RecurrentDropout::NoMemoryLoss { drop_p: 1., masks: MaskPer::Step };
    let layer = Cell::Lstm.layer(none, &generator(), vb())?;
    let mut old = state.1.clone().expect("a cell");
    for (_, c) in layer.seq(&xs, &state, &layer.masks(true)?)? {
        let c = c.expect("a cell");
        let forget = (&c / &old)?.flatten_all()?.to_vec1::<f64>()?;
        assert!(forget.iter().all(|f| (0.0..1.0).contains(f) && *f > 0.), "{forget:?}");
        old = c;
    }
    Ok(())
}

#[test]
fn zoneout_evaluates_step_by_step_to_its_expectation() -> Result<()> {
    for cell in Cell::BOTH {
        let vb = seeded_var_builder(&VarMap::new(), 5, DType::F64, &Device::Cpu);
        let xs = random(&[B, 1, IN], DType::F64, 1)?;
        let state = state_of(cell, DType::F64)?;
        let states = |dropout: RecurrentDropout| -> Result<State> {
            let layer = cell.layer(dropout, &generator(), vb.clone())?;
            Ok(layer.seq(&xs, &state, &layer.masks(false)?)?.remove(0))
        };
        let (plain, ours) = (states(RecurrentDropout::None)?, states(KINDS[5])?);
        let p = |drop_p| {
            Ok::<_, Error>(1. - DropMask::new(drop_p, generator().next_key())?.rate().keep_p())
        };
        let mixed = |new: &Tensor, old: &Tensor, p: f64| (new * (1. - p))? + (old * p)?;
        assert!(error(&ours.0, &mixed(&plain.0, &state.0, p(0.2)?)?)? < 1e-15);
        if let (Some(ours), Some(plain), Some(old)) = (&ours.1, &plain.1, &state.1) {
            assert!(error(ours, &mixed(plain, old, p(0.4)?)?)? < 1e-15);
        }
    }
    Ok(())
}

// ---- stacks, switches, refusals ----

#[test]
fn layers_stack_and_carry_their_states() -> Result<()> {
    let vars = VarMap::new();
    let vb = seeded_var_builder(&vars, 5, DType::F32, &Device::Cpu);
    let (generator, config) = (generator(), LSTMConfig::default());
    let lower = Lstm::new(IN, 6, config, KINDS[1], generator.clone(), vb.pp("lower"))?;
    let upper = Lstm::new(6, HIDDEN, config, KINDS[5], generator, vb.pp("upper"))?;
    let xs = random(&[B, T, IN], DType::F32, 1)?;
    let y = upper.forward(&lower.forward(&xs, true)?, true)?;
    assert_eq!(y.dims(), [B, T, HIDDEN]);
    let grads = y.sqr()?.backward()?;
    for (name, var) in vars.data().lock().unwrap().iter() {
        let grad = grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
        assert!(largest(&grad.to_dtype(DType::F64)?)? > 0., "{name}");
    }
    let whole = lower.seq(&xs, false)?;
    let first = lower.seq(&xs.narrow(1, 0, 2)?, false)?;
    let rest = lower.seq_init(&xs.narrow(1, 2, T - 2)?, &first[1], false)?;
    let off = error(&rest[T - 3].c.to_dtype(DType::F64)?, &whole[T - 1].c.to_dtype(DType::F64)?)?;
    assert!(off < 1e-6, "{off:e}");
    Ok(())
}

#[test]
fn what_is_dropped_can_be_changed() -> Result<()> {
    let vb = seeded_var_builder(&VarMap::new(), 5, DType::F32, &Device::Cpu);
    let mut layer = Gru::new(IN, HIDDEN, GRUConfig::default(), KINDS[1], generator(), vb)?;
    let bad = RecurrentDropout::Variational { input_p: 0.1, state_p: 1.5 };
    assert!(layer.set_dropout(bad).is_err());
    assert_eq!(layer.dropout(), KINDS[1], "what is refused changes nothing");
    layer.set_dropout(RecurrentDropout::None)?;
    assert_eq!(layer.dropout(), RecurrentDropout::None);
    let xs = random(&[B, T, IN], DType::F32, 1)?;
    assert_eq!(bits(&layer.forward(&xs, true)?)?, bits(&layer.forward(&xs, false)?)?);
    Ok(())
}

#[track_caller]
fn assert_refused<R>(result: Result<R>, expected: &str) {
    let error = result.err().unwrap_or_else(|| panic!("expected an error: {expected}")).to_string();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn errors_name_layer_argument_expected_got_and_remedy() -> Result<()> {
    let generator = generator();
    let vb = || seeded_var_builder(&VarMap::new(), 5, DType::F32, &Device::Cpu).pp("encoder");
    let lstm = |in_dim, hidden, dropout| {
        Lstm::new(in_dim, hidden, LSTMConfig::default(), dropout, generator.clone(), vb())
    };
    let gru =
        |dropout| Gru::new(IN, HIDDEN, GRUConfig::default(), dropout, generator.clone(), vb());
    assert_refused(lstm(0, 3, KINDS[0]), "lstm encoder: in_dim: expected at least 1, got 0; give");
    assert_refused(lstm(3, 0, KINDS[0]), "lstm encoder: hidden_dim: expected at least 1, got 0");
    for (dropout, rate) in [
        (RecurrentDropout::Variational { input_p: -0.1, state_p: 0. }, "input_p"),
        (RecurrentDropout::Naive { input_p: 0., state_p: 1.1 }, "state_p"),
        (RecurrentDropout::NoMemoryLoss { drop_p: f64::NAN, masks: MaskPer::Step }, "candidate"),
        (RecurrentDropout::Zoneout { cell_p: 2., state_p: 0. }, "cell_p"),
    ] {
        let expected = format!(
            "lstm encoder: {rate}: drop_p: expected a probability of dropping in [0, 1], got"
        );
        assert_refused(lstm(IN, HIDDEN, dropout), &expected);
    }
    let zoneout = RecurrentDropout::Zoneout { cell_p: 0.1, state_p: 0.1 };
    assert_refused(
        gru(zoneout),
        "gru encoder: cell_p: expected 0, since this layer has no cell, got 0.1; give",
    );

    let (layer, state) = (lstm(IN, HIDDEN, KINDS[1])?, state_of(Cell::Lstm, DType::F32)?);
    let state = LSTMState::new(state.0, state.1.expect("a cell"));
    let xs = |dims: &[usize]| random(dims, DType::F32, 1);
    let expected =
        "lstm encoder: xs: expected [B, T, in_dim] with in_dim = 4 and at least one step, got";
    for dims in [&[B, T][..], &[B, T, IN + 1], &[B, 0, IN]] {
        assert_refused(layer.seq(&xs(dims)?, true), expected);
    }
    let wide = xs(&[B, T, IN])?.to_dtype(DType::F64)?;
    assert_refused(
        layer.seq(&wide, true),
        "lstm encoder: xs: expected dtype F32 like the weights, got F64",
    );
    assert_refused(
        layer.seq_init(&xs(&[B + 1, T, IN])?, &state, true),
        "lstm encoder: state.h: expected [B, hidden_dim] = [4, 7], got [3, 7]; begin with zero_state",
    );
    let bad = LSTMState::new(state.h.clone(), state.c.narrow(1, 0, 3)?);
    assert_refused(
        layer.seq_init(&xs(&[B, T, IN])?, &bad, true),
        "lstm encoder: state.c: expected",
    );
    assert_refused(
        layer.states_to_tensor(&[]),
        "lstm encoder: states: expected at least one, got none",
    );
    assert_eq!(generator.state().counter, 0, "no key is drawn for what is refused");

    let masks = layer.next_masks(true)?.window(B + 1, 2, 0);
    assert_refused(
        layer.seq_masked(&xs(&[B, T, IN])?, &state, &masks),
        "lstm encoder: masks.window: expected first_sample + samples <= batch, got 2 + 3 > 4; pass",
    );
    let layer = Zoneout::new(0.5, generator)?;
    let [new, old] = [[2, 3], [3, 2]].map(|dims| xs(&dims).expect("a tensor"));
    for train in [true, false] {
        assert_refused(
            layer.forward(&new, &old, train),
            "zoneout: old: expected shape [2, 3] like new",
        );
    }
    assert_refused(
        Zoneout::new(1.5, Arc::new(MaskGenerator::new(1))),
        "zoneout: drop_p: expected a",
    );
    Ok(())
}
