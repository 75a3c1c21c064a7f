//! What the examples are made of: their data, and the pooling of the CNN.

use std::path::{Path, PathBuf};

use candle_core::{Device, Result, Tensor, Var};
use candle_dropout_models::{Args, Images, Text};
use clap::Parser;

#[allow(dead_code)]
#[path = "../mnist/model.rs"]
mod cnn;

/// A file of these bytes.
fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn message<T>(result: anyhow::Result<T>) -> String {
    format!("{:#}", result.err().expect("an error"))
}

#[test]
fn pooling_takes_the_largest_and_gives_its_gradient_to_one_pixel() -> Result<()> {
    // Two windows beside one another; the second has its largest value three times.
    let x = Var::new(&[[[[1f32, 2., 7., 7.], [4., 3., 0., 7.]]]], &Device::Cpu)?;
    let y = cnn::max_pool(&x)?;
    assert_eq!(y.dims(), [1, 1, 1, 2]);
    assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [4., 7.]);
    let dy = Tensor::new(&[[[[3f32, 5.]]]], &Device::Cpu)?;
    let grads = (y * dy)?.sum_all()?.backward()?;
    let dx = grads.get(&x).expect("a gradient").flatten_all()?.to_vec1::<f32>()?;
    assert_eq!(dx, [0., 0., 5., 0., 3., 0., 0., 0.]);
    Ok(())
}

#[test]
fn pooling_keeps_images_channels_and_rows_apart() -> Result<()> {
    // Ascending: the largest of a window is its last.
    let x = Tensor::arange(0f32, 2. * 3. * 4. * 6., &Device::Cpu)?.reshape((2, 3, 4, 6))?;
    let y = cnn::max_pool(&x)?;
    let last = x.reshape((2, 3, 2, 2, 3, 2))?.narrow(3, 1, 1)?.narrow(5, 1, 1)?;
    assert_eq!(y.dims(), [2, 3, 2, 3]);
    assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, last.flatten_all()?.to_vec1::<f32>()?);
    Ok(())
}

#[test]
fn missing_files_are_skipped_and_with_require_data_an_error() -> anyhow::Result<()> {
    let there = file("there.txt", b"text");
    let folder = there.parent().unwrap().to_str().unwrap();
    let args = Args::parse_from(["example", "--data", folder]);
    assert_eq!(args.files(["there.txt"])?, Some([there.clone()]));
    assert_eq!(args.files(["there.txt", "no.txt"])?, None);

    let args = Args::parse_from(["example", "--data", folder, "--require-data"]);
    assert_eq!(args.files(["there.txt"])?, Some([there]));
    let error = message(args.files(["there.txt", "no.txt"]));
    assert!(error.contains("no.txt; --data names the folder"), "{error}");
    Ok(())
}

#[test]
fn texts_without_a_whole_window_are_refused() -> anyhow::Result<()> {
    // A window of four tokens needs the one that follows, too.
    let error = message(Text::read(&file("short.txt", b"four"), 4));
    assert!(
        error.contains("short.txt: expected more than the 4 bytes of a window, got 4"),
        "{error}"
    );

    let text = Text::read(&file("long.txt", b"fives"), 4)?;
    let (inputs, targets) = text.batch(2, &mut Args::parse_from(["example"]).batches())?;
    assert_eq!(inputs.to_vec2::<u32>()?, [b"five".map(u32::from); 2]);
    assert_eq!(targets.to_vec1::<u32>()?, b"ivesives".map(u32::from));
    Ok(())
}

#[test]
fn files_without_whole_images_are_refused() -> anyhow::Result<()> {
    let cifar = |name, bytes: &[u8]| message(Images::cifar(&file(name, bytes)));
    let error = cifar("empty.bin", &[]);
    assert!(error.contains("empty.bin: expected images, got none"), "{error}");
    let error = cifar("cut.bin", &[0; 3072]);
    assert!(error.contains("cut.bin: expected records of 3073 bytes, got 3072 bytes"), "{error}");
    let error = cifar("class.bin", &[10; 3073]);
    assert!(error.contains("class.bin: expected classes below 10, got 10"), "{error}");
    assert_eq!(Images::cifar(&file("one.bin", &[9; 3073]))?.pixels.dims(), [1, 3, 32, 32]);

    let labels = |n: u8| [&[0, 0, 8, 1, 0, 0, 0, n][..], &vec![3; n.into()]].concat();
    let one = [&[0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 28, 0, 0, 0, 28][..], &[0; 784]].concat();
    let mnist = |images: &[u8], labels: &[u8]| {
        Images::mnist(&file("images.idx", images), &file("labels.idx", labels))
    };
    let error = message(mnist(&one[..15], &labels(1)));
    assert!(error.contains("images.idx: expected an idx file of bytes in 3 dimensions"), "{error}");
    let error = message(mnist(&one[..16], &labels(0)));
    assert!(error.contains("images.idx: expected images, got none"), "{error}");
    let error = message(mnist(&one, &labels(2)));
    assert!(error.contains("expected 2 images of 1 x 28 x 28 pixels"), "{error}");
    assert_eq!(mnist(&one, &labels(1))?.classes.to_vec1::<u32>()?, [3]);
    Ok(())
}
