//! Monte-Carlo dropout on the real thing; skipped where there is no data.

use std::path::Path;

use anyhow::Result;
use candle_dropout_models::{Args, Images};
use clap::Parser;

#[path = "../mc_dropout/model.rs"]
mod model;

#[test]
fn clothes_tell_more_about_the_weights_than_digits_do() -> Result<()> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let args = Args { data, ..Args::parse_from(["test"]) };
    let Some(files) = args.files(model::FILES)? else { return Ok(()) };
    let [images, labels, test_images, test_labels, fashion_images, fashion_labels] = files;
    let mlp = model::trained(&Images::mnist(&images, &labels)?, 600, 42)?;
    let test = Images::mnist(&test_images, &test_labels)?;
    let accuracy = test.accuracy(1000, |images| mlp.forward(images, false))?;
    assert!(accuracy > 91., "it has learned digits: {accuracy} %");

    let clothes = Images::mnist(&fashion_images, &fashion_labels)?;
    let of_digits = model::Uncertainty::of(&mlp, &test.pixels.narrow(0, 0, 900)?, 42)?;
    let of_clothes = model::Uncertainty::of(&mlp, &clothes.pixels, 42)?;
    let (digits, clothes) = (&of_digits.information, &of_clothes.information);
    assert_eq!((digits.len(), clothes.len()), (900, 900));
    let means = (model::mean(digits), model::mean(clothes));
    println!(
        "mutual information: digits {:.3}, clothes {:.3}; AUROC {:.3}",
        means.0,
        means.1,
        model::auroc(digits, clothes)
    );
    assert!(means.1 > 1.5 * means.0, "{means:?}");
    assert!(model::auroc(digits, clothes) > 0.75);
    Ok(())
}
