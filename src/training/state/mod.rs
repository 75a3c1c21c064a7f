//! A training that survives: all that it needs to go on, in one file.

mod checksum;
mod file;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor, bail};

use super::{AdamW, LrSchedule, NamedVars};
use crate::layers::ScheduledRate;
use crate::mask::{MaskGenerator, MaskState};
use file::{Outline, Whole};

const NAME: &str = "training state";

/// What names in the file begin with.
const WEIGHTS: &str = "weights.";
const OPTIMIZER: &str = "optimizer.";
const MASKS: &str = "masks.";
const SCHEDULE: &str = "schedule.";
const CLOCK: &str = "clock.";

/// Differences that an error lists before it only counts them.
const LISTED: usize = 8;

/// How far a training has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Steps that are done: the next one has this index.
    pub step: usize,
    /// Anything else that the caller goes on from, such as the state of its data loader in JSON.
    pub text: String,
}

/// All that a training needs to go on as if it had never stopped, saved in one file and loaded from it:
/// weights, optimiser, mask generators, schedules, the clocks of rates, and progress.
///
/// It holds handles to what the training changes, so one is made at the start and serves to the end.
///
/// # The file
/// One file of safetensors: `weights.<name>`, `optimizer.<name>`, and `__metadata__` for what is no tensor.
/// `save` writes it whole to `<path>.tmp`, flushes that to the disk and renames it. So a run that is killed at
/// any moment leaves the old state or the new one, and one that cannot save keeps the old one. One process at a
/// time saves to a path.
///
/// `load` takes a file only if every byte is what was written (there is a checksum over all of it), and
/// only if the training is the one that saved it: names, shapes and dtypes of all variables and of the
/// optimiser's state, its parameters but for the rate, the names of generators, and the schedules must be
/// equal. All this is checked before anything is changed.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Result, Tensor};
/// use candle_dropout::training::{AdamW, LrSchedule, ParamGroup, Progress, TrainingState, named_vars};
/// use candle_dropout::{Dropout, MaskGenerator, seeded_var_builder};
/// use candle_nn::{Module, Optimizer, ParamsAdamW, VarMap};
///
/// # fn main() -> Result<()> {
/// # let path = std::env::temp_dir().join(format!("training-state-{}.safetensors", std::process::id()));
/// /// Trains up to `steps`, from where the file stands; the loss of the last step.
/// fn train(path: &std::path::Path, steps: usize) -> Result<f32> {
///     let (map, masks) = (VarMap::new(), Arc::new(MaskGenerator::new(1)));
///     let head = candle_nn::linear(3, 2, seeded_var_builder(&map, 1, DType::F32, &Device::Cpu))?;
///     let dropout = Dropout::with_generator(0.5, masks.clone())?;
///     let (vars, schedule) = (named_vars(&map)?, LrSchedule::cosine(0.1, 10)?);
///     let mut adamw = AdamW::from_groups(vec![ParamGroup::new(&vars)], ParamsAdamW::default())?;
///     let state =
///         TrainingState::new(&vars).with_masks("dropout", &masks).with_schedule("lr", &schedule);
///
///     let start = if path.exists() { state.load(path, &mut adamw)?.step } else { 0 };
///     let (x, mut last) = (Tensor::new(&[[1f32, 2., 3.]], &Device::Cpu)?, f32::NAN);
///     for step in start..steps {
///         adamw.set_learning_rate(schedule.at(step));
///         let loss = head.forward(&dropout.forward(&x, true)?)?.sqr()?.sum_all()?;
///         adamw.backward_step(&loss)?;
///         last = loss.to_scalar()?;
///         state.save(path, &adamw, &Progress { step: step + 1, ..Default::default() })?;
///     }
///     Ok(last)
/// }
/// train(&path, 4)?; // stopped here
/// let resumed = train(&path, 10)?;
/// std::fs::remove_file(&path)?;
/// assert_eq!(resumed, train(&path, 10)?); // in one go
/// # std::fs::remove_file(&path)?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct TrainingState {
    vars: NamedVars,
    masks: BTreeMap<String, Arc<MaskGenerator>>,
    schedules: BTreeMap<String, LrSchedule>,
    rates: BTreeMap<String, ScheduledRate>,
    /// The first name that was given to two of a kind, and the kind: an error of `save` and `load`, since a
    /// generator that another has replaced would not be saved.
    twice: Option<(&'static str, String)>,
}

impl TrainingState {
    /// Of a training of these variables.
    pub fn new(vars: &NamedVars) -> Self {
        Self {
            vars: vars.clone(),
            masks: BTreeMap::new(),
            schedules: BTreeMap::new(),
            rates: BTreeMap::new(),
            twice: None,
        }
    }

    /// And of this generator, under a name of its own.
    pub fn with_masks(mut self, name: &str, masks: &Arc<MaskGenerator>) -> Self {
        if self.masks.insert(name.to_string(), masks.clone()).is_some() {
            self.twice.get_or_insert(("mask generators", name.to_string()));
        }
        self
    }

    /// And with this schedule, under a name of its own: it has no state, but a training goes on only with
    /// an equal one.
    pub fn with_schedule(mut self, name: &str, schedule: &LrSchedule) -> Self {
        let is_there = self.rates.contains_key(name);
        if self.schedules.insert(name.to_string(), *schedule).is_some() || is_there {
            self.twice.get_or_insert(("schedules", name.to_string()));
        }
        self
    }

    /// And with this rate, under a name that no other schedule has: its schedule has to be an equal one, and the step
    /// of its clock is set to what was saved.
    pub fn with_rate(mut self, name: &str, rate: &ScheduledRate) -> Self {
        let is_there = self.schedules.contains_key(name);
        if self.rates.insert(name.to_string(), rate.clone()).is_some() || is_there {
            self.twice.get_or_insert(("schedules", name.to_string()));
        }
        self
    }

    /// Writes the state of this moment to `path`; on CUDA it waits for the device.
    ///
    /// # Errors
    /// The optimiser does not know its variables by the names that they have here (as one of `AdamW::new` does
    /// not); two generators have one name, or two schedules; a variable has a dtype of small floats; names and
    /// text are longer than a header of safetensors may be, 100 MB; the file cannot be written. What was there is
    /// kept. Only where the folder cannot be flushed to the disk, which the error says, the new state is
    /// in place already, and a loss of power may undo that.
    pub fn save(&self, path: impl AsRef<Path>, adamw: &AdamW, progress: &Progress) -> Result<()> {
        let path = path.as_ref();
        self.check_names(path, adamw)?;
        let mut tensors = BTreeMap::new();
        for (name, var) in &self.vars {
            tensors.insert(format!("{WEIGHTS}{name}"), var.as_tensor().clone());
        }
        for (name, tensor) in adamw.state()? {
            tensors.insert(format!("{OPTIMIZER}{name}"), tensor);
        }
        let mut metadata = BTreeMap::new();
        let mut insert = |kind: &str, values: BTreeMap<String, String>| {
            metadata
                .extend(values.into_iter().map(|(name, value)| (format!("{kind}{name}"), value)));
        };
        insert(OPTIMIZER, adamw.settings());
        insert(SCHEDULE, self.schedules()?);
        let masks = self.masks.iter().map(|(name, masks)| {
            (name.clone(), format!("{:032x}", u128::from_le_bytes(masks.state().to_bytes())))
        });
        insert(MASKS, masks.collect());
        let steps =
            self.rates.iter().map(|(name, rate)| (name.clone(), rate.clock().step().to_string()));
        insert(CLOCK, steps.collect());
        metadata.insert("step".to_string(), progress.step.to_string());
        metadata.insert("text".to_string(), progress.text.clone());
        file::write(path, &tensors, metadata)
    }

    /// Goes on from the state in `path`: sets variables, optimiser, generators and clocks, and says how far it had come.
    ///
    /// # Errors
    /// The file is missing, truncated, damaged, foreign, or the state of another training; or `save` would
    /// not take the optimiser or the names. Each is an error that says so, and then nothing has been changed.
    pub fn load(&self, path: impl AsRef<Path>, adamw: &mut AdamW) -> Result<Progress> {
        let path = path.as_ref();
        self.check_names(path, adamw)?;
        let file = file::read(path)?;
        let mut expected = BTreeMap::<String, Outline>::new();
        for (name, var) in &self.vars {
            expected.insert(format!("{WEIGHTS}{name}"), var.as_tensor().into());
        }
        let optimizer = adamw.state_layout();
        for (name, dims, dtype) in &optimizer {
            let outline = Outline { dims: dims.clone(), dtype: *dtype };
            expected.insert(format!("{OPTIMIZER}{name}"), outline);
        }
        agree(path, "tensors", &expected, &file.outlines()?)?;
        agree(path, "optimizer", &adamw.settings(), &of_kind(&file, OPTIMIZER))?;
        agree(path, "schedules", &self.schedules()?, &of_kind(&file, SCHEDULE))?;
        let saved = of_kind(&file, MASKS);
        let there = |names: Vec<&String>| -> BTreeMap<String, &str> {
            names.into_iter().map(|name| (name.clone(), "a generator")).collect()
        };
        let expected = there(self.masks.keys().collect());
        agree(path, "mask generators", &expected, &there(saved.keys().collect()))?;
        let mut states = Vec::new();
        for (name, masks) in &self.masks {
            let state = saved.get(name).map(String::as_str);
            let parse = |text: &str| u128::from_str_radix(text, 16).ok();
            let state = parsed(path, name, state, "32 hexadecimal digits", parse)?;
            states.push((masks, MaskState::from_bytes(state.to_le_bytes())));
        }
        let text = |name: &str| file.metadata.get(name).map(String::as_str);
        let mut steps = Vec::new();
        for (name, rate) in &self.rates {
            let step = text(&format!("{CLOCK}{name}"));
            steps.push((rate, parsed(path, name, step, "a step", |text| text.parse().ok())?));
        }
        let progress = Progress {
            step: parsed(path, "step", text("step"), "a number of steps", |text| {
                text.parse().ok()
            })?,
            text: parsed(path, "text", text("text"), "a text", |text| Some(text.to_string()))?,
        };
        // Everything is read, to its device, before anything is set.
        let mut weights = Vec::new();
        for (name, var) in &self.vars {
            weights.push((var, file.tensor(&format!("{WEIGHTS}{name}"), var.device())?));
        }
        let mut state = BTreeMap::<String, Tensor>::new();
        for (name, ..) in optimizer {
            let loaded = file.tensor(&format!("{OPTIMIZER}{name}"), &Device::Cpu)?;
            state.insert(name, loaded);
        }
        adamw.restore(&state)?;
        for (var, tensor) in weights {
            var.set(&tensor)?;
        }
        for (masks, state) in states {
            masks.restore(state);
        }
        for (rate, step) in steps {
            rate.clock().set_step(step);
        }
        Ok(progress)
    }

    /// Checks that each name is that of one thing, and that the optimiser knows its variables by the names that
    /// they have here: those of places would be given to others where the order is that of a hash map, and equal
    /// shapes mixed up without a word.
    fn check_names(&self, path: &Path, adamw: &AdamW) -> Result<()> {
        if let Some((kind, name)) = &self.twice {
            bail!(
                "{NAME}: {}: {kind}: {name}: expected each name once, got it twice; give each a name of \
                 its own",
                path.display()
            )
        }
        for (name, var) in adamw.named_vars() {
            if self.vars.get(name).is_none_or(|named| named.id() != var.id()) {
                bail!(
                    "{NAME}: {}: adamw: {name}: expected the name of a variable of this training, got it for \
                     another or for none; build the optimiser with AdamW::from_groups and the names",
                    path.display()
                )
            }
        }
        Ok(())
    }

    /// The schedules in the words of the file.
    fn schedules(&self) -> Result<BTreeMap<String, String>> {
        let json = |name: &String, text: serde_json::Result<String>| {
            Ok((name.clone(), text.map_err(candle_core::Error::wrap)?))
        };
        let lr = self.schedules.iter().map(|(name, lr)| json(name, serde_json::to_string(lr)));
        let rates = self.rates.iter();
        let rates = rates.map(|(name, rate)| json(name, serde_json::to_string(rate.schedule())));
        lr.chain(rates).collect()
    }
}

/// What the file says of a kind, by name.
fn of_kind(file: &Whole, kind: &str) -> BTreeMap<String, String> {
    let of_kind = file.metadata.iter();
    of_kind
        .filter_map(|(name, value)| Some((name.strip_prefix(kind)?.into(), value.clone())))
        .collect()
}

/// What a value of the file says.
fn parsed<T>(
    path: &Path,
    name: &str,
    text: Option<&str>,
    expected: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<T> {
    match text.and_then(parse) {
        Some(value) => Ok(value),
        None => bail!(
            "{NAME}: {}: {name}: expected {expected}, got {}; take an older copy, or save it anew",
            path.display(),
            text.unwrap_or("none")
        ),
    }
}

/// Checks that the training and the file have the same names and for each the same.
fn agree<T: PartialEq + std::fmt::Display>(
    path: &Path,
    what: &str,
    expected: &BTreeMap<String, T>,
    got: &BTreeMap<String, T>,
) -> Result<()> {
    let mut differences = Vec::new();
    for (name, expected) in expected {
        match got.get(name) {
            Some(got) if got == expected => {}
            Some(got) => differences.push(format!("{name}: expected {expected}, got {got}")),
            None => differences.push(format!("{name}: expected {expected}, got none")),
        }
    }
    for (name, got) in got.iter().filter(|(name, _)| !expected.contains_key(*name)) {
        differences.push(format!("{name}: expected none, got {got}"));
    }
    if differences.is_empty() {
        return Ok(());
    }
    let more = match differences.len().saturating_sub(LISTED) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    differences.truncate(LISTED);
    bail!(
        "{NAME}: {}: {what}: {}{more}; it is the state of another training: give it this one's settings, \
         or save to another file",
        path.display(),
        differences.join("; ")
    )
}
