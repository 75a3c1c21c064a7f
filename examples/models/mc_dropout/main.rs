//! What a model does not know: an MLP that has learned digits is shown clothes. Monte-Carlo dropout, all passes in one
//! forward, finds the mutual information of class and weights higher there than on digits it has not seen.
//!
//!     cargo run --release -p candle-dropout-models --example mc_dropout -- --steps 600

use std::time::Instant;

use anyhow::Result;
use candle_dropout_models::{Args, Images};
use clap::Parser;

mod model;

fn main() -> Result<()> {
    let (args, begin) = (Args::parse(), Instant::now());
    let Some(files) = args.files(model::FILES)? else { return Ok(()) };
    let [images, labels, test_images, test_labels, fashion_images, fashion_labels] = files;
    let digits = Images::mnist(&images, &labels)?;
    let (test, clothes) = (
        Images::mnist(&test_images, &test_labels)?,
        Images::mnist(&fashion_images, &fashion_labels)?,
    );

    let model = model::trained(&digits, args.steps, args.seed)?;
    let accuracy = test.accuracy(1000, |images| model.forward(images, false))?;
    println!("{accuracy:.1} % of 1000 digits are right");
    let of_digits = model::Uncertainty::of(&model, &test.pixels.narrow(0, 0, 900)?, args.seed)?;
    let of_clothes = model::Uncertainty::of(&model, &clothes.pixels, args.seed)?;
    println!("nats on average      digits  clothes");
    let means = [
        ("mutual information", &of_digits.information, &of_clothes.information),
        ("predictive entropy", &of_digits.predictive, &of_clothes.predictive),
    ];
    for (name, digits, clothes) in means {
        println!("{name:<20} {:6.3}   {:6.3}", model::mean(digits), model::mean(clothes));
        let auroc = model::auroc(digits, clothes);
        println!(
            "  it is higher for an item of clothing than for a digit in {:.1} % of pairs",
            100. * auroc
        );
    }
    println!("{:.1} s", begin.elapsed().as_secs_f64());
    Ok(())
}
