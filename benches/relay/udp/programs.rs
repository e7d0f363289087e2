//! The programs with a UDP mode, each with its own command line for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{RELAY, SERVICE};
use crate::namespace::{MARK, Namespace};
use crate::programs::Program;

/// Who may send a header: the load comes from loopback.
const TRUSTED: &str = "127.0.0.0/8\n";

/// The settings that matter, for the report.
pub(super) fn settings(program: Program, threads: usize) -> String {
    match program {
        Program::Direct => "the load asks the service, no header".to_owned(),
        Program::Mmproxyctl => {
            format!("protocol=udp (udp-header=every), run --no-check --workers {threads}")
        }
        Program::GoMmproxy => format!("-p udp -listeners {threads} -mark {MARK}"),
        Program::Mmproxy => format!("--protocol udp --listeners {threads} --mark {MARK}"),
        other => other.settings(threads),
    }
}

/// The command that runs it in the foreground, with its files under `dir`; none for the direct row.
///
/// # Errors
/// When a file cannot be written, or the program has no UDP.
pub(super) fn command(
    program: Program,
    namespace: &Namespace,
    dir: &Path,
    threads: usize,
) -> Result<Option<Command>> {
    let write = |name: &str, text: String| -> Result<PathBuf> {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    };
    let mut command = namespace.command(program.path());
    let threads = threads.to_string();
    let mark = MARK.to_string();
    let trusted = write("allow.txt", TRUSTED.to_owned())?;
    match program {
        Program::Direct => return Ok(None),
        Program::Mmproxyctl => {
            write("pathways.conf", format!("{MARK} connmark=auto\n"))?;
            let (ip, port) = (SERVICE.ip(), SERVICE.port());
            let line = format!("bench\t{MARK}\t{RELAY}\t{ip}\t{port}\t-\tprotocol=udp\n");
            write("instances.tsv", line)?;
            command
                .env_remove("ALLOW_LIST_PATH")
                .args(["--log-format", "text", "--quiet", "--config-dir"])
                .arg(dir)
                .arg("--runtime-dir")
                .arg(dir.join("run"))
                // the namespace has the pathway's routes, but not from `pathway add`
                .args(["run", "--no-check", "--workers", &threads, "bench"]);
        }
        Program::GoMmproxy => {
            command
                .args(["-p", "udp", "-l", &RELAY.to_string()])
                .args(["-4", &SERVICE.to_string(), "-mark", &mark])
                .args(["-listeners", &threads, "-allowed-subnets"])
                .arg(trusted);
        }
        Program::Mmproxy => {
            command
                .args(["--protocol", "udp", "--listen-addr", &RELAY.to_string()])
                .args(["--ipv4", &SERVICE.to_string(), "--mark", &mark])
                .args(["--listeners", &threads, "--allowed-subnets"])
                .arg(trusted);
        }
        other => bail!("{} has no PROXY protocol over UDP", other.title()),
    }
    Ok(Some(command))
}
