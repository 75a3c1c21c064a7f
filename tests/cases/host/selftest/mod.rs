//! Proves the prover: faulty kernels fail for the right reason, their faultless twins pass.

use half::{bf16, f16};

use crate::harness::{Case, Order, POISON, Plain, Program};

static SELFTEST: Program = Program::new("tests/kernels-on-cpu/selftest.cu");

fn one_block(kernel: &str, threads: u32) -> Case {
    Case::new(kernel, [1, 1, 1], [threads, 1, 1], 0)
}

/// The case must fail, and its report must hold every one of the phrases.
#[track_caller]
fn assert_fails(case: Case, phrases: &[&str]) {
    let Err(failure) = SELFTEST.run_one(case) else { panic!("nothing was noticed") };
    for phrase in phrases {
        assert!(failure.report.contains(phrase), "expected `{phrase}` in\n{}", failure.report);
    }
}

fn whole_numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37) % 101) as f32).collect()
}

fn block_sums(x: &[f32], block: usize) -> Vec<f32> {
    x.chunks(block).map(|part| part.iter().sum()).collect()
}

#[test]
fn a_correct_block_reduction_is_correct_in_every_order() {
    let (blocks, threads) = (3, 256);
    let x = whole_numbers(blocks * threads);
    let case = |kernel, shared_bytes| {
        Case::new(kernel, [blocks as u32, 1, 1], [threads as u32, 1, 1], shared_bytes)
            .input(&x)
            .output::<f32>(blocks)
    };
    let cases = [case("block_sum_f32", 0), case("block_sum_by_shuffles_f32", 8 * 4)];
    for outputs in SELFTEST.run(&cases).unwrap() {
        assert_eq!(outputs.get::<f32>(0), block_sums(&x, threads));
    }
}

#[test]
fn a_missing_barrier_is_noticed() {
    let x = whole_numbers(256);
    let case = || one_block("block_sum_without_barrier_f32", 256).input(&x).output::<f32>(1);
    assert_fails(case(), &["depends on the order of the threads", "a barrier is missing"]);
    // Even in a single order the sum is wrong, because what is not yet written is poison.
    let outputs = SELFTEST.run_one(case().orders(&[Order::Forward])).unwrap();
    assert!(outputs.get::<f32>(0)[0].is_nan());
    assert_fails(
        one_block("rotate_without_barrier_i32", 32).output::<i32>(32),
        &["depends on the order"],
    );
    let rotated = SELFTEST.run_one(one_block("rotate_i32", 32).output::<i32>(32)).unwrap();
    assert_eq!(rotated.get::<i32>(0), (0..32).map(|lane| (lane + 1) % 32).collect::<Vec<_>>());
}

#[test]
fn a_warp_that_overtakes_the_others_is_noticed() {
    let x = whole_numbers(256);
    let case = |kernel| one_block(kernel, 256).input(&x).output::<f32>(256);
    let outputs = SELFTEST.run_one(case("two_sums_f32")).unwrap();
    assert_eq!(outputs.get::<f32>(0), [x.iter().sum::<f32>() * 256.; 256]);
    assert_fails(case("two_sums_without_barrier_f32"), &["depends on the order of the threads"]);
}

#[test]
fn votes_and_atomics_count() {
    let x: Vec<f32> = (0..1000).map(|i| if i % 3 == 0 { 1.0 } else { -1.0 }).collect();
    let case = Case::new("count_positive_f32", [4, 1, 1], [256, 1, 1], 0)
        .input(&x)
        .in_out(&[0u32])
        .value(1000i32);
    assert_eq!(SELFTEST.run_one(case).unwrap().get::<u32>(0), [334]);
}

#[test]
fn shuffles_follow_the_cuda_manual() {
    let outputs = SELFTEST.run_one(one_block("shuffles_i32", 32).output::<i32>(32 * 8)).unwrap();
    for (lane, got) in outputs.get::<i32>(0).chunks(8).enumerate() {
        let lane = lane as i32;
        let (segment, place) = (lane / 8 * 8, lane % 8);
        let expected = [
            5,
            segment + 3,
            if lane < 2 { lane } else { lane - 2 },
            if place < 2 { lane } else { lane - 2 },
            if lane + 3 < 32 { lane + 3 } else { lane },
            if place + 3 < 8 { lane + 3 } else { lane },
            lane ^ 9,
            // Only towards earlier segments.
            if lane ^ 9 < segment + 8 { lane ^ 9 } else { lane },
        ];
        assert_eq!(got, expected, "lane {lane}");
    }
    let halves = SELFTEST.run_one(one_block("half_warps_i32", 32).output::<i32>(32)).unwrap();
    assert_eq!(halves.get::<i32>(0), [[1; 16], [21; 16]].concat());
}

#[test]
fn a_collective_with_inactive_lanes_is_noticed() {
    let case = |kernel, threads| one_block(kernel, threads).output::<i32>(32);
    let returned = || case("shuffle_with_returned_lanes_i32", 32);
    // Forward, the early lanes are waiting when the first of the others returns.
    assert_fails(
        returned().orders(&[Order::Forward]),
        &["wait for ever", "threads 20..31 have returned"],
    );
    assert_fails(
        returned().orders(&[Order::Reverse]),
        &["__shfl_xor_sync", "inactive lane 20", "has returned"],
    );
    assert_fails(
        case("shuffle_with_returned_lanes_i32", 16),
        &["inactive lane 16", "does not exist"],
    );
    assert_fails(
        case("shuffle_from_outside_the_mask_i32", 32),
        &["reads lane 16, which is not in the mask 0000ffff"],
    );
    assert_fails(
        case("divergent_shuffles_i32", 32),
        &["divergent warp", "threads 0..15 wait", "threads 16..31 wait"],
    );
}

#[test]
fn a_divergent_barrier_is_noticed() {
    let case = |kernel| one_block(kernel, 64).output::<i32>(64);
    assert_fails(
        case("barrier_in_one_branch_i32"),
        &["divergent barrier", "threads 0..31 wait in __syncthreads", "selftest.cu:"],
    );
    assert_fails(
        case("barrier_against_collective_i32"),
        &["wait for ever", "threads 7..7 wait in __syncthreads"],
    );
    let outputs = SELFTEST.run_one(case("returned_threads_leave_the_barrier_i32")).unwrap();
    assert_eq!(outputs.get::<i32>(0)[..40], [1; 40]);
}

#[test]
fn a_single_element_out_of_bounds_is_noticed() {
    let fill = |n: i32| Case::new("fill_f32", [2, 1, 1], [64, 1, 1], 0).output::<f32>(100).value(n);
    SELFTEST.run_one(fill(100)).unwrap();
    assert_fails(
        fill(101),
        &[
            "heap-buffer-overflow",
            "WRITE of size 4",
            "selftest.cu",
            "in fill_f32, block (1, 0, 0), thread (36, 0, 0)",
        ],
    );
    assert_fails(
        one_block("read_before_f32", 8).input(&[0.0f32; 8]).output::<f32>(8),
        &["heap-buffer-overflow", "READ"],
    );
    let before = one_block("write_before_f32", 8).output::<f32>(8).misaligned_by(4);
    assert_fails(before, &["argument 0: the kernel wrote 4 bytes before its start"]);
}

#[test]
fn an_overrun_of_shared_memory_is_noticed() {
    let case = |slot: i32| one_block("static_shared_overrun_f32", 32).output::<f32>(32).value(slot);
    SELFTEST.run_one(case(31)).unwrap();
    assert_fails(case(32), &["selftest.cu", "in static_shared_overrun_f32"]);
    let case = |shared_bytes| {
        Case::new("dynamic_shared_overrun_f32", [1, 1, 1], [32, 1, 1], shared_bytes)
            .output::<f32>(32)
    };
    SELFTEST.run_one(case(32 * 4)).unwrap();
    assert_fails(case(32 * 4 - 1), &["heap-buffer-overflow", "in dynamic_shared_overrun_f32"]);
    assert_fails(case(300 << 10), &["no GPU has 307200 bytes of shared memory"]);
}

#[test]
fn what_is_not_written_stays_poison() {
    let outputs = SELFTEST
        .run_one(Case::new("fill_f32", [2, 1, 1], [64, 1, 1], 0).output::<f32>(100).value(99i32))
        .unwrap();
    assert_eq!(outputs.bytes(0)[99 * 4..], [POISON; 4]);
    assert!(outputs.get::<f32>(0)[99].is_nan());
    let shared = |kernel| Case::new(kernel, [2, 1, 1], [32, 1, 1], 0);
    let cases = [
        shared("unset_shared_f32").output::<f32>(64),
        shared("unset_shared_f16").output::<f16>(64),
    ];
    for outputs in SELFTEST.run(&cases).unwrap() {
        assert!(outputs.bytes(0).iter().all(|&byte| byte == POISON));
    }
}

#[test]
fn a_misaligned_vector_access_is_noticed() {
    let x = whole_numbers(32);
    let copy = |offset_bytes| {
        one_block("copy_vectors_f32", 8).input(&x).misaligned_by(offset_bytes).output::<f32>(32)
    };
    assert_eq!(SELFTEST.run_one(copy(16)).unwrap().get::<f32>(0), x);
    assert_fails(copy(8), &["misaligned address", "requires 16 byte alignment"]);
    let store = one_block("copy_vectors_f32", 8).input(&x).output::<f32>(32).misaligned_by(4);
    assert_fails(store, &["misaligned address", "requires 16 byte alignment"]);
}

#[test]
fn arguments_must_fit_the_kernel() {
    let pair = [2u64.to_le_bytes().as_slice(), &0.5f32.to_le_bytes(), &[0; 4]].concat();
    let case = || one_block("arguments_f32", 1);
    let outputs =
        SELFTEST.run_one(case().null().output::<f32>(3).value_bytes(&pair).value(3i32)).unwrap();
    assert_eq!(outputs.get::<f32>(0), [2.5; 3]);
    let outputs = SELFTEST
        .run_one(case().input(&[1.0f32; 3]).output::<f32>(3).value_bytes(&pair).value(3i32))
        .unwrap();
    assert_eq!(outputs.get::<f32>(0), [3.5; 3]);

    let short = case().null().output::<f32>(3).value_bytes(&pair[..12]).value(3i32);
    assert_fails(short, &["argument 2 has 12 bytes, but the kernel takes 16"]);
    assert_fails(
        case().null().input(&[0f32; 3]).value_bytes(&pair).value(3i32),
        &["argument 1 is an input"],
    );
    assert_fails(
        case().null().output::<f32>(3).value(3i32),
        &["the case has 3 arguments, but the kernel takes 4"],
    );
    assert_fails(one_block("arguments_f64", 1), &["there is no such kernel"]);
    assert_fails(
        one_block("fill_f32", 1025).output::<f32>(1).value(1i32),
        &["no GPU launches blocks of (1025, 1, 1)"],
    );
}

#[test]
fn a_failing_case_is_named_and_the_cases_before_it_are_not() {
    let fill = |n: i32| one_block("fill_f32", 32).output::<f32>(8).value(n);
    let failure = SELFTEST.run(&[fill(8), fill(7), fill(9), fill(8)]).err().unwrap();
    assert_eq!(failure.case, Some(2));
}

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
    multiplies_matrices("mma_f16", f16::from_f32);
    multiplies_matrices("mma_bf16", bf16::from_f32);
}

#[test]
fn an_asynchronous_copy_wants_its_wait_and_its_barrier() {
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
    let x: Vec<u32> = (0..2 * 64 * 4).collect();
    let case = |kernel| one_block(kernel, 64).input(&x).output::<u32>(64);
    let sums = SELFTEST.run_one(case("copy_over_u32")).unwrap().get::<u32>(0);
    assert_eq!(sums, (0..64).map(|t| 2 * ((t + 1) % 64) * 4 + 64 * 4).collect::<Vec<_>>());
    assert_fails(case("copy_over_without_barrier_u32"), &["depends on the order"]);
}
