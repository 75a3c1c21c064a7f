//! Runs that do not disturb one another.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Result, anyhow};

/// Runs `jobs` on `threads` threads, each inside a rayon pool of its own so that runs never share
/// workers; with one thread, on that of the caller, so that on CUDA no tensor crosses threads.
/// Results come in the order of the jobs; the first error stops what has not started.
pub fn side_by_side<J: Sync, R: Send>(
    jobs: &[J],
    threads: usize,
    work: impl Fn(&J) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    if threads == 1 {
        return jobs.iter().map(work).collect();
    }
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let worker = || -> Result<Vec<(usize, R)>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
        let mut done = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(i) else { break };
            let result = pool.install(|| work(job));
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            done.push((i, result?));
        }
        Ok(done)
    };
    let done = std::thread::scope(|scope| -> Result<Vec<(usize, R)>> {
        let workers: Vec<_> = (0..threads.min(jobs.len())).map(|_| scope.spawn(worker)).collect();
        let mut done = Vec::new();
        for worker in workers {
            done.extend(worker.join().map_err(|_| anyhow!("a training thread panicked"))??);
        }
        Ok(done)
    });
    let mut done = done?;
    done.sort_by_key(|(i, _)| *i);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn side_by_side_keeps_the_order_and_passes_errors_on() {
        let jobs: Vec<usize> = (0..20).collect();
        assert_eq!(
            side_by_side(&jobs, 3, |j| Ok(j * 2)).unwrap(),
            (0..40).step_by(2).collect::<Vec<_>>()
        );
        let error = side_by_side(&jobs, 3, |&j| if j == 5 { Err(anyhow!("five")) } else { Ok(j) })
            .unwrap_err();
        assert_eq!(error.to_string(), "five");
    }
    #[test]
    fn one_thread_is_that_of_the_caller() {
        let caller = std::thread::current().id();
        let ids = side_by_side(&[(); 3], 1, |()| Ok(std::thread::current().id())).unwrap();
        assert_eq!(ids, [caller; 3]);
        let ids = side_by_side(&[(); 3], 2, |()| Ok(std::thread::current().id())).unwrap();
        assert!(ids.iter().all(|&id| id != caller));
    }
}
