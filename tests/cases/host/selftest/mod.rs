//! Proves the prover: faulty kernels fail for the right reason, their faultless twins pass.

mod instructions;

use half::f16;

use super::{Case, Order, POISON, Program, skip_without_compiler};

static SELFTEST: Program = Program::new("tests/cases/host/selftest/selftest.cu");

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
    skip_without_compiler!();
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
    skip_without_compiler!();
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
    skip_without_compiler!();
    let x = whole_numbers(256);
    let case = |kernel| one_block(kernel, 256).input(&x).output::<f32>(256);
    let outputs = SELFTEST.run_one(case("two_sums_f32")).unwrap();
    assert_eq!(outputs.get::<f32>(0), [x.iter().sum::<f32>() * 256.; 256]);
    assert_fails(case("two_sums_without_barrier_f32"), &["depends on the order of the threads"]);
}

#[test]
fn votes_and_atomics_count() {
    skip_without_compiler!();
    let x: Vec<f32> = (0..1000).map(|i| if i % 3 == 0 { 1.0 } else { -1.0 }).collect();
    let case = Case::new("count_positive_f32", [4, 1, 1], [256, 1, 1], 0)
        .input(&x)
        .in_out(&[0u32])
        .value(1000i32);
    assert_eq!(SELFTEST.run_one(case).unwrap().get::<u32>(0), [334]);
}

#[test]
fn shuffles_follow_the_cuda_manual() {
    skip_without_compiler!();
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
    skip_without_compiler!();
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
    skip_without_compiler!();
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
    skip_without_compiler!();
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
fn what_a_table_points_to_is_guarded_too() {
    skip_without_compiler!();
    let case = |lens: [u64; 2]| {
        let table: Vec<u64> = lens.iter().flat_map(|len| [0, 0, *len]).collect();
        Case::new("double_rows_f32", [2, 1, 1], [32, 1, 1], 0)
            .input(&table)
            .pointing(0, 1)
            .pointing(8, 2)
            .pointing(24, 3)
            .pointing(32, 4)
            .input(&[1f32, 2.])
            .behind()
            .output::<f32>(2)
            .behind()
            .input(&[3f32, 4., 5.])
            .behind()
            .output::<f32>(3)
            .behind()
            .misaligned_by(4)
    };
    let outputs = SELFTEST.run_one(case([2, 3])).unwrap();
    assert_eq!(outputs.get::<f32>(0), [2., 4.]);
    assert_eq!(outputs.get::<f32>(1), [6., 8., 10.]);
    assert_fails(case([2, 4]), &["heap-buffer-overflow", "in double_rows_f32, block (1, 0, 0)"]);
}

#[test]
fn an_overrun_of_shared_memory_is_noticed() {
    skip_without_compiler!();
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
    skip_without_compiler!();
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
    skip_without_compiler!();
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
    skip_without_compiler!();
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
    skip_without_compiler!();
    let fill = |n: i32| one_block("fill_f32", 32).output::<f32>(8).value(n);
    let failure = SELFTEST.run(&[fill(8), fill(7), fill(9), fill(8)]).err().unwrap();
    assert_eq!(failure.case, Some(2));
}
