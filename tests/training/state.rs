//! What is saved is taken back bit for bit, by the training that saved it and by no other.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::training::{AdamW, LossScale, Progress};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;

/// Random bits as floats, NaN and infinities among them.
fn random(dims: &[usize], dtype: DType, rng: &mut StdRng) -> Result<Tensor> {
    let bytes: Vec<u8> =
        (0..dims.iter().product::<usize>() * dtype.size_in_bytes()).map(|_| rng.random()).collect();
    Tensor::from_raw_buffer(&bytes, dtype, dims, &Device::Cpu)
}

const DTYPES: [DType; 6] = [DType::F32, DType::F64, DType::F16, DType::BF16, DType::U32, DType::U8];

/// Variables with random names, shapes, dtypes and values.
fn random_vars(rng: &mut StdRng) -> Result<NamedVars> {
    let mut vars = NamedVars::new();
    for i in 0..rng.random_range(0..6) {
        let dims: Vec<usize> =
            (0..rng.random_range(0..4)).map(|_| rng.random_range(0..5)).collect();
        let dtype = DTYPES[rng.random_range(0..DTYPES.len())];
        let name = ["h.0.weight", "ö \"quoted\"\n", "", "checksum", "__metadata__", "step"][i];
        vars.insert(name.to_string(), Var::from_tensor(&random(&dims, dtype, rng)?)?);
    }
    Ok(vars)
}

/// The same variables with other values.
fn twin(vars: &NamedVars, rng: &mut StdRng) -> Result<NamedVars> {
    let twin = |(name, var): (&String, &Var)| {
        Ok((name.clone(), Var::from_tensor(&random(var.dims(), var.dtype(), rng)?)?))
    };
    vars.iter().map(twin).collect()
}

proptest! {
    #[test]
    fn any_state_is_taken_back_bit_for_bit(
        seed in any::<u64>(),
        step in any::<usize>(),
        text in any::<String>(),
        name in any::<String>(),
    ) {
        let check = || -> Result<()> {
            let mut rng = StdRng::seed_from_u64(seed);
            let folder = Folder::new("round-trip")?;
            let path = folder.file("state.safetensors");
            let vars = random_vars(&mut rng)?;
            let master = rng.random::<bool>();
            let build = |vars: &NamedVars| -> Result<AdamW> {
                let adamw = adamw(vars, ParamsAdamW::default())?;
                let adamw = if master { adamw.with_master_weights()? } else { adamw };
                adamw.with_loss_scale(LossScale::dynamic())
            };
            let mut saved = build(&vars)?;
            let mut grads = GradStore::default();
            for var in vars.values().filter(|var| var.dtype().is_float()) {
                grads.insert(var, random(var.dims(), var.dtype(), &mut rng)?);
            }
            saved.step(&grads)?;
            let masks = Arc::new(MaskGenerator::new(rng.random()));
            masks.next_key();
            let state = TrainingState::new(&vars).with_masks(&name, &masks);
            let progress = Progress { step, text: text.clone() };
            state.save(&path, &saved, &progress)?;

            let others = twin(&vars, &mut rng)?;
            let mut loaded = build(&others)?;
            let other_masks = Arc::new(MaskGenerator::new(1));
            let state = TrainingState::new(&others).with_masks(&name, &other_masks);
            assert_eq!(state.load(&path, &mut loaded)?, progress);
            assert_eq!(bits(&others, &loaded, &[&other_masks])?, bits(&vars, &saved, &[&masks])?);
            Ok(())
        };
        check().map_err(|error| TestCaseError::fail(error.to_string()))?;
    }
}

#[test]
fn any_reader_of_safetensors_finds_the_weights() -> Result<()> {
    let folder = Folder::new("reader")?;
    let path = folder.file("state.safetensors");
    let training = Training::new(8, 10, 1)?;
    training.state.save(&path, &training.adamw, &Progress::default())?;
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
    for (name, var) in &training.vars {
        let loaded = tensors[&format!("weights.{name}")].flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(loaded, var.flatten_all()?.to_vec1::<f32>()?, "{name}");
    }
    assert!(!folder.file("state.safetensors.tmp").exists());
    Ok(())
}

#[test]
fn a_dtype_of_small_floats_is_refused() -> Result<()> {
    let folder = Folder::new("dtype")?;
    let path = folder.file("state.safetensors");
    let var = Var::zeros(2, DType::F8E4M3, &Device::Cpu)?;
    let vars = NamedVars::from([("scale".to_string(), var)]);
    let adamw = adamw(&NamedVars::new(), ParamsAdamW::default())?;
    let result = TrainingState::new(&vars).save(&path, &adamw, &Progress::default());
    let message = result.expect_err("it is refused").to_string();
    assert!(message.contains("weights.scale: expected a dtype of floats"), "{message}");
    assert!(!path.exists() && !folder.file("state.safetensors.tmp").exists());
    Ok(())
}

/// What `load` says; nothing may change.
fn refusal(training: &mut Training, path: &Path) -> Result<String> {
    let before = training.bits()?;
    let result = training.state.load(path, &mut training.adamw);
    assert_eq!(training.bits()?, before, "{result:?}");
    Ok(result.expect_err("it is refused").to_string())
}

#[test]
fn the_state_of_another_training_is_refused_by_name() -> Result<()> {
    let folder = Folder::new("others")?;
    let path = folder.file("state.safetensors");
    let mut saved = Training::new(8, 10, 1)?;
    saved.step(0)?;
    saved.state.save(&path, &saved.adamw, &Progress::default())?;

    type Change = fn(Training) -> Result<Training>;
    let cases: [(Change, &str); 8] = [
        (
            |_| Training::new(12, 10, 1),
            "tensors: optimizer.first_moment.h.0.attn.c_attn.bias: expected F32 [36], got F32 [24]; ",
        ),
        (
            |training| {
                let mut vars = training.vars.clone();
                vars.insert("head.weight".into(), Var::zeros(3, DType::F32, &Device::Cpu)?);
                let state = TrainingState::new(&vars).with_masks("gpt", &training.masks);
                let state = state.with_schedule("lr", &training.schedule);
                Ok(Training { vars, state, ..training })
            },
            "tensors: weights.head.weight: expected F32 [3], got none; it is the state of another",
        ),
        (
            |training| {
                let adamw = adamw(&training.vars, ParamsAdamW::default())?.with_clip_norm(1.)?;
                let adamw = adamw.with_loss_scale(LossScale::dynamic())?;
                Ok(Training { adamw, ..training })
            },
            "tensors: optimizer.good_steps: expected I64 [], got none; ",
        ),
        (
            |training| {
                let adamw = adamw(&training.vars, ParamsAdamW::default())?.with_clip_norm(2.)?;
                Ok(Training { adamw, ..training })
            },
            "optimizer: max_norm: expected 2.0, got 1.0; ",
        ),
        (
            |training| {
                let params = ParamsAdamW { beta2: 0.95, ..Default::default() };
                let adamw = adamw(&training.vars, params)?.with_clip_norm(1.)?;
                Ok(Training { adamw, ..training })
            },
            "optimizer: beta2: expected 0.95, got 0.999; ",
        ),
        (
            |_| Training::new(8, 11, 1),
            "schedules: lr: expected {\"decay\":\"cosine\",\"lr\":0.01,\"warmup_steps\":1,\"steps\":11,\
             \"final_lr\":0.0}, got {",
        ),
        (
            |training| {
                let state = training.state.with_masks("second", &training.masks);
                Ok(Training { state, ..training })
            },
            "mask generators: second: expected a generator, got none; ",
        ),
        (
            |training| {
                let state =
                    TrainingState::new(&training.vars).with_schedule("lr", &training.schedule);
                Ok(Training { state, ..training })
            },
            "mask generators: gpt: expected none, got a generator; ",
        ),
    ];
    for (change, part) in cases {
        let mut other = change(Training::new(8, 10, 1)?)?;
        let message = refusal(&mut other, &path)?;
        let begin = format!("training state: {}: {part}", path.display());
        assert!(message.starts_with(&begin), "{message}\n{begin}");
    }
    let mut same = Training::new(8, 10, 2)?;
    same.state.load(&path, &mut same.adamw)?;
    assert_eq!(same.bits()?, saved.bits()?);
    Ok(())
}

#[test]
fn an_optimiser_of_variables_without_their_names_is_refused() -> Result<()> {
    let folder = Folder::new("unnamed")?;
    let path = folder.file("state.safetensors");
    let training = Training::new(8, 10, 1)?;
    // The order of a hash map is another one in each process, and equal shapes would be mixed up.
    let mut adamw = AdamW::new(training.vars.values().cloned().collect(), ParamsAdamW::default())?;
    for result in [
        training.state.save(&path, &adamw, &Progress::default()),
        training.state.load(&path, &mut adamw).map(drop),
    ] {
        let message = result.expect_err("it is refused").to_string();
        assert!(message.contains("adamw: 0: expected the name of a variable"), "{message}");
    }
    assert!(!path.exists());
    Ok(())
}

#[test]
fn a_name_that_is_given_twice_is_refused() -> Result<()> {
    let folder = Folder::new("twice")?;
    let path = folder.file("state.safetensors");
    let mut training = Training::new(8, 10, 1)?;
    training.state.save(&path, &training.adamw, &Progress::default())?;
    let saved = std::fs::read(&path)?;
    let state = training.state.clone();
    let masks = Arc::new(MaskGenerator::new(2));
    for (state, part) in [
        (state.clone().with_masks("gpt", &masks), "mask generators: gpt"),
        // Though it is the same one.
        (state.clone().with_schedule("lr", &training.schedule), "schedules: lr"),
    ] {
        training.state = state;
        let begin = format!(
            "training state: {}: {part}: expected each name once, got it twice; ",
            path.display()
        );
        let save = training.state.save(&path, &training.adamw, &Progress::default());
        let message = save.expect_err("it is refused").to_string();
        assert!(message.starts_with(&begin), "{message}");
        assert_eq!(std::fs::read(&path)?, saved);
        let message = refusal(&mut training, &path)?;
        assert!(message.starts_with(&begin), "{message}");
    }
    Ok(())
}

#[test]
fn a_header_that_no_reader_takes_is_not_written() -> Result<()> {
    let folder = Folder::new("header")?;
    let path = folder.file("state.safetensors");
    let adamw = adamw(&NamedVars::new(), ParamsAdamW::default())?;
    let mut loaded = AdamW::from_groups(Vec::new(), ParamsAdamW::default())?;
    let state = TrainingState::new(&NamedVars::new());
    let progress = |len: usize| Progress { step: 3, text: "a".repeat(len) };
    // All but the text, and spaces up to a multiple of 8.
    state.save(&path, &adamw, &progress(0))?;
    let length = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let most = 100_000_000 - length(&std::fs::read(&path)?);
    state.save(&path, &adamw, &progress(most))?;
    assert_eq!(length(&std::fs::read(&path)?), 100_000_000);
    assert_eq!(state.load(&path, &mut loaded)?, progress(most));

    let error = state.save(&path, &adamw, &progress(most + 8));
    let message = error.expect_err("it is refused").to_string();
    assert!(message.contains("of at most 100000000 bytes, got 100000008; keep"), "{message}");
    assert_eq!(state.load(&path, &mut loaded)?, progress(most));
    Ok(())
}

#[test]
fn what_cannot_be_saved_keeps_the_old_file() -> Result<()> {
    let folder = Folder::new("kept")?;
    let path = folder.file("state.safetensors");
    let mut training = Training::new(8, 10, 1)?;
    training.state.save(&path, &training.adamw, &Progress { step: 7, ..Default::default() })?;
    let old = std::fs::read(&path)?;
    training.step(0)?;
    let save = |training: &Training, path: &Path| {
        let error = training.state.save(path, &training.adamw, &Progress::default());
        error.expect_err("it cannot be saved").to_string()
    };
    // A folder is where the new file would be written.
    let beside = folder.file("state.safetensors.tmp");
    std::fs::create_dir(&beside)?;
    let message = save(&training, &path);
    let begin = format!("training state: {}: expected to write it, got: ", path.display());
    assert!(message.starts_with(&begin) && message.contains("what was there is kept"), "{message}");
    assert_eq!(std::fs::read(&path)?, old);
    std::fs::remove_dir(&beside)?;

    // A folder is where it would be renamed to, or there is none.
    std::fs::create_dir_all(folder.file("folder/inside"))?;
    assert!(save(&training, &folder.file("folder")).contains("expected to write it"));
    assert!(!folder.file("folder.tmp").exists());
    assert!(save(&training, &folder.file("none/state")).contains("expected to write it"));
    assert!(save(&training, Path::new("/")).contains("expected the name of a file"));

    // What a killed run has left does not matter.
    std::fs::write(&beside, "half a file")?;
    training.state.save(&path, &training.adamw, &Progress { step: 8, ..Default::default() })?;
    assert!(!beside.exists());
    assert_eq!(training.state.load(&path, &mut training.adamw)?.step, 8);
    Ok(())
}

#[test]
fn a_training_goes_on_bit_for_bit() -> Result<()> {
    let folder = Folder::new("resumed")?;
    let path = folder.file("state.safetensors");
    let mut whole = Training::new(16, 12, 1)?;
    let mut parts = Training::new(16, 12, 1)?;
    for step in 0..5 {
        assert_eq!(whole.step(step)?.to_bits(), parts.step(step)?.to_bits());
    }
    parts.state.save(&path, &parts.adamw, &Progress { step: 5, text: "{}".into() })?;
    let mut resumed = Training::new(16, 12, 2)?;
    let start = resumed.state.load(&path, &mut resumed.adamw)?;
    assert_eq!((start.step, start.text.as_str()), (5, "{}"));
    assert_eq!(resumed.bits()?, parts.bits()?);
    for step in 5..12 {
        assert_eq!(whole.step(step)?.to_bits(), resumed.step(step)?.to_bits(), "step {step}");
    }
    let bits: [BTreeMap<_, _>; 2] = [whole.bits()?, resumed.bits()?];
    assert_eq!(bits[0], bits[1]);
    Ok(())
}
