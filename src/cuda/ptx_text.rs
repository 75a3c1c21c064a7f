//! What is read from the text of a PTX module.
//!
//! One kernel out of many: a driver compiles all that a module holds when it loads it, and of attention's 78
//! kernels a program uses three.

/// The module that holds `kernel` alone; `None` if `ptx` has no such kernel.
///
/// What precedes the first kernel (version, target, declarations) belongs to all of them. Functions are
/// inlined and static shared memory is declared within kernels, so none needs another.
pub(crate) fn kernel_alone(ptx: &str, kernel: &str) -> Option<String> {
    const ENTRY: &str = "\n.visible .entry ";
    let header = &ptx[..ptx.find(ENTRY)?];
    let start = ptx.find(&format!("{ENTRY}{kernel}("))?;
    let behind = start + ENTRY.len();
    let end = ptx[behind..].find(ENTRY).map_or(ptx.len(), |next| behind + next);
    Some([header, &ptx[start..end]].concat())
}

/// The compute capability that a module was built for, 80 for 8.0; `None` if `ptx` names no target.
pub(crate) fn target(ptx: &str) -> Option<u32> {
    let name = ptx.lines().find_map(|line| line.strip_prefix(".target sm_"))?;
    let digits = name.find(|c: char| !c.is_ascii_digit()).unwrap_or(name.len());
    name[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &str =
        "// a comment\n.version 9.0\n.target sm_80\n.extern .shared .b8 shared[];\n
.visible .entry fwd(\n\t.param .u64 x\n)\n{\n\tret;\n}
.visible .entry fwd_d64(\n\t.param .u64 x\n)\n{\n\texit;\n}
.visible .entry bwd()\n{\n\ttrap;\n}\n";

    #[test]
    fn a_kernel_keeps_the_header_and_loses_the_others() {
        let header = "// a comment\n.version 9.0\n.target sm_80\n.extern .shared .b8 shared[];\n";
        for (kernel, body) in [("fwd", "ret"), ("fwd_d64", "exit"), ("bwd", "trap")] {
            let alone = kernel_alone(MODULE, kernel).expect("the module has it");
            assert!(alone.starts_with(header) && alone.contains(body), "{kernel}: {alone}");
            assert!(alone.contains(&format!(".entry {kernel}(")), "{kernel}: {alone}");
            assert_eq!(alone.matches(".entry").count(), 1, "{kernel}: {alone}");
            assert!(alone.trim_end().ends_with('}'), "{kernel}: {alone}");
        }
    }

    #[test]
    fn what_a_module_does_not_hold_is_not_found() {
        assert_eq!(kernel_alone(MODULE, "fwd_d6"), None);
        assert_eq!(kernel_alone("", "fwd"), None);
    }

    #[test]
    fn a_module_tells_what_it_was_built_for() {
        assert_eq!(target(MODULE), Some(80));
        assert_eq!(target(".target sm_90a, texmode_independent"), Some(90));
        assert_eq!(target(".target sm_120"), Some(120));
        assert_eq!(target(".version 9.0"), None);
    }
}
