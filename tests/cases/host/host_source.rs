//! CUDA as C++.

/// Turns preprocessed CUDA into C++. Only two words need more than a macro:
///
/// - `__global__` goes, and the kernel's name is noted, to be registered at the end of the file;
/// - `__shared__ T name[n];` becomes a static variable, followed by a registration that has it
///   poisoned for every block; `extern __shared__ T name[];` a pointer to the memory of the launch.
///
/// So kernels stay ordinary CUDA, and no list of them has to be kept.
pub(super) fn host_source(cuda: &str) -> Result<String, String> {
    let mut host = String::with_capacity(cuda.len());
    let mut kernels = Vec::new();
    let mut rest = cuda;
    while let Some(at) = rest.find("__global__").into_iter().chain(rest.find("__shared__")).min() {
        let (before, found) = rest.split_at(at);
        let (word, after) = found.split_at("__global__".len());
        host.push_str(before);
        if word == "__global__" {
            let (signature, _) = after.split_once('(').ok_or("a kernel without parameters")?;
            kernels.push(last_identifier(signature)?);
            rest = after;
            continue;
        }
        let (declaration, after) =
            after.split_once(';').ok_or("a __shared__ declaration without an end")?;
        let (declarator, _) = declaration.split_once('[').unwrap_or((declaration, ""));
        let name = last_identifier(declarator)?;
        if let Some(kept) = host.trim_end().strip_suffix("extern") {
            host.truncate(kept.len());
            // Attributes of alignment go: the buffer is aligned, and its elements need not be.
            let element = declarator.rsplit(')').next().unwrap_or(declarator).replacen(name, "", 1);
            host.push_str(&format!(
                "{element} *const {name} = machine::dynamic_shared<{element}>();"
            ));
        } else if declaration.contains(',') {
            return Err(format!("`__shared__{declaration}`: write one declaration a variable"));
        } else {
            host.push_str(&format!(
                "static {declaration}; static machine::SharedVariable shared_{name}({name});"
            ));
        }
        rest = after;
    }
    host.push_str(rest);
    for kernel in kernels {
        host.push_str(&format!(
            "static const runner::Registration registration_of_{kernel}(\"{kernel}\", &{kernel});\n"
        ));
    }
    Ok(host)
}

fn last_identifier(text: &str) -> Result<&str, String> {
    let mut identifiers = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    identifiers.rfind(|word| !word.is_empty()).ok_or_else(|| format!("no name in `{text}`"))
}
