//! Conversions, matrix instructions and asynchronous copies.

use half::{bf16, f16};

use super::{SELFTEST, assert_fails, one_block};
use crate::host::{Case, Order, Plain, skip_without_compiler};

/// Floats around every 16-bit value: the value, the middle to its neighbour, and just beside both.
fn floats_around(values: impl Iterator<Item = f32>) -> Vec<f32> {
    let bits_after = |x: f32, step: i32| f32::from_bits(x.to_bits().wrapping_add_signed(step));
    let middles = |x: f32| [0, 1 << 12, 1 << 15].map(|half_unit| bits_after(x, half_unit));
    let beside = |x: f32| [-1, 0, 1].map(|step| bits_after(x, step));
    let mut floats: Vec<f32> = values.flat_map(middles).flat_map(beside).collect();
    // Halves below 2^-14 lie further apart: multiples of 2^-24, and the middles between them.
    floats.extend((0..2050).map(|i| i as f32 * 2f32.powi(-25)).flat_map(beside));
    floats.extend([
        65504.0,
        65519.996,
        65520.0,
        65536.0,
        f32::MAX,
        f32::MIN_POSITIVE,
        f32::INFINITY,
        f32::NAN,
        -0.0,
    ]);
    floats
}

#[test]
fn conversions_equal_those_of_the_half_crate() {
    skip_without_compiler!();
    let launch = |kernel| Case::new(kernel, [4, 1, 1], [256, 1, 1], 0).orders(&[Order::Forward]);
    let patterns: Vec<u16> = (0..=u16::MAX).collect();
    let around_f16 = floats_around(patterns.iter().map(|&bits| f16::from_bits(bits).to_f32()));
    let around_bf16 = floats_around(patterns.iter().map(|&bits| bf16::from_bits(bits).to_f32()));
    let widen = |kernel| {
        launch(kernel).input(&patterns).output::<f32>(patterns.len()).value(patterns.len() as i32)
    };
    let narrow =
        |kernel, x: &[f32]| launch(kernel).input(x).output::<u16>(x.len()).value(x.len() as i32);
    let cases = [
        widen("f16_to_f32"),
        widen("bf16_to_f32"),
        narrow("f32_to_f16", &around_f16),
        narrow("f32_to_bf16", &around_bf16),
    ];
    let outputs = SELFTEST.run(&cases).unwrap();

    // A NaN is a NaN: hardware and `half` keep different bits of it.
    for (&bits, (wide_f16, wide_bf16)) in
        patterns.iter().zip(outputs[0].get::<f32>(0).into_iter().zip(outputs[1].get::<f32>(0)))
    {
        for (got, expected) in
            [(wide_f16, f16::from_bits(bits).to_f32()), (wide_bf16, bf16::from_bits(bits).to_f32())]
        {
            assert!(
                got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(),
                "{bits:04x}: {got} {expected}"
            );
        }
    }
    for (&x, got) in around_f16.iter().zip(outputs[2].get::<f16>(0)) {
        let expected = f16::from_f32(x);
        assert!(
            got.to_bits() == expected.to_bits() || got.is_nan() && x.is_nan(),
            "{x:e}: {got:?} {expected:?}"
        );
    }
    for (&x, got) in around_bf16.iter().zip(outputs[3].get::<bf16>(0)) {
        let expected = bf16::from_f32(x);
        assert!(
            got.to_bits() == expected.to_bits() || got.is_nan() && x.is_nan(),
            "{x:e}: {got:?} {expected:?}"
        );
    }
}

#[test]
fn ldmatrix_gives_rows_and_columns_by_the_ptx_manual() {
    skip_without_compiler!();
    let rows: Vec<u16> = (0..32 * 8).collect();
    let case = |kernel, first_row: i32| {
        Case::new(kernel, [1, 1, 1], [32, 1, 1], 32 * 16)
            .input(&rows)
            .output::<u32>(32 * 4)
            .value(first_row)
    };
    let cases = [case("ldmatrix_u16", 0), case("ldmatrix_trans_u16", 0)];
    for (outputs, is_transposed) in SELFTEST.run(&cases).unwrap().iter().zip([false, true]) {
        for (at, got) in outputs.get::<u32>(0).into_iter().enumerate() {
            let (lane, matrix) = (at / 4, at % 4);
            let element = |e: usize| {
                let (row, col) = (lane / 4, lane % 4 * 2 + e);
                let (row, col) = if is_transposed { (col, row) } else { (row, col) };
                u32::from(rows[(8 * matrix + row) * 8 + col])
            };
            assert_eq!(got, element(0) | element(1) << 16, "lane {lane}, matrix {matrix}");
        }
    }
    assert_fails(case("ldmatrix_u16", 1), &["ldmatrix reads 16 bytes that are not all shared"]);
    let global = one_block("ldmatrix_global_u16", 32).input(&rows).output::<u32>(32);
    assert_fails(global, &["ldmatrix reads 16 bytes that are not all shared"]);
}

fn multiplies_matrices<T: Plain>(kernel: &str, from_f32: impl Fn(f32) -> T) {
    let numbers = |len: usize, step: usize| -> Vec<f32> {
        (0..len).map(|i| ((i * step) % 23) as f32 - 11.).collect()
    };
    let (a, b, c) = (numbers(16 * 16, 7), numbers(16 * 8, 5), numbers(16 * 8, 3));
    let halves = |x: &[f32]| x.iter().map(|x| from_f32(*x)).collect::<Vec<_>>();
    let case = |lanes: i32| {
        one_block(kernel, 32)
            .input(&halves(&a))
            .input(&halves(&b))
            .input(&c)
            .output::<f32>(16 * 8)
            .value(lanes)
    };
    let product = SELFTEST.run_one(case(32)).unwrap().get::<f32>(0);
    for (at, got) in product.into_iter().enumerate() {
        let (m, n) = (at / 8, at % 8);
        let sum: f32 = (0..16).map(|k| a[m * 16 + k] * b[k * 8 + n]).sum();
        assert_eq!(got, c[at] + sum, "row {m}, column {n}");
    }
    assert_fails(case(31).orders(&[Order::Forward]), &["wait for ever", "mma_m16n8k16"]);
}

#[test]
fn mma_equals_a_plain_matrix_product() {
    skip_without_compiler!();
    multiplies_matrices("mma_f16", f16::from_f32);
    multiplies_matrices("mma_bf16", bf16::from_f32);
}

#[test]
fn an_asynchronous_copy_wants_its_wait_and_its_barrier() {
    skip_without_compiler!();
    let threads = 64;
    let x: Vec<u32> = (0..2 * threads * 4).collect();
    let case = |kernel, read: i32, shift: i32| {
        Case::new(kernel, [1, 1, 1], [threads, 1, 1], 2 * threads * 16)
            .input(&x)
            .output::<u32>(x.len())
            .value(read)
            .value(shift)
    };
    let run = |kernel, read| SELFTEST.run_one(case(kernel, read, 0)).unwrap().get::<u32>(0);
    let expected = |read: u32| -> Vec<u32> {
        let at = |i: u32| (i / 4 / threads * threads + (i / 4 + 1) % threads) * 4 + i % 4;
        let copied = |i: u32| if i / 4 % threads < read { x[i as usize] } else { 0 };
        (0..2 * threads * 4).map(|i| copied(at(i))).collect()
    };
    assert_eq!(run("copy_u32", 64), expected(64));
    assert_eq!(run("copy_u32", 50), expected(50));
    // Of two groups the wait leaves one under way: the first has come, the second is poison.
    let half = x.len() / 2;
    let first = run("copy_first_group_u32", 64);
    assert_eq!(first[..half], expected(64)[..half]);
    assert!(first[half..].iter().all(|word| *word == u32::MAX));
    assert!(run("copy_without_wait_u32", 64).iter().all(|word| *word == u32::MAX));
    assert_fails(case("copy_without_barrier_u32", 64, 0), &["depends on the order"]);
    assert_fails(case("copy_u32", 64, 1), &["cp_async_16: misaligned address"]);
    assert_fails(case("copy_u32", 64, 4), &["writes 16 bytes that are not all shared"]);
    let misaligned = Case::new("copy_u32", [1, 1, 1], [threads, 1, 1], 2 * threads * 16)
        .input(&x)
        .misaligned_by(8)
        .output::<u32>(x.len());
    assert_fails(misaligned.value(64i32).value(0i32), &["cp_async_16: misaligned address"]);
}

#[test]
fn a_copy_over_what_others_still_read_is_noticed() {
    skip_without_compiler!();
    let x: Vec<u32> = (0..2 * 64 * 4).collect();
    let case = |kernel| one_block(kernel, 64).input(&x).output::<u32>(64);
    let sums = SELFTEST.run_one(case("copy_over_u32")).unwrap().get::<u32>(0);
    assert_eq!(sums, (0..64).map(|t| 2 * ((t + 1) % 64) * 4 + 64 * 4).collect::<Vec<_>>());
    assert_fails(case("copy_over_without_barrier_u32"), &["depends on the order"]);
}
