//! The programs that are compared, each with the configuration that is best for it and fair to the others.
//!
//! Owns: configuration files, command lines and versions. Must not know: what is measured.
//!
//! All get as many threads (or worker processes, or listeners) as there are relay threads, room for the idle
//! row's connections, time limits longer than a row, and no log of connections. What is particular is said
//! where it is written.

use std::fs;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::namespace::{MARK, Namespace};

/// Who may send a header: the load comes from loopback.
const TRUSTED: &str = "127.0.0.0/8\n";

/// mmproxy-rs opens one socket whatever `--listeners` says and passes the number to listen(2): with the
/// default of 1 it drops most of fifty clients. Its threads are one per core and cannot be chosen.
const MMPROXY_BACKLOG: &str = "4096";

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Program {
    /// No relay: the load talks to the service, without a header
    Direct,
    /// The mmproxyctl of this checkout
    Mmproxyctl,
    /// HAProxy, source 0.0.0.0 usesrc client
    Haproxy,
    /// HAProxy, the same with option splice-auto
    HaproxySplice,
    /// nginx stream, proxy_bind transparent
    Nginx,
    /// go-mmproxy of Debian (path-network's)
    GoMmproxy,
    /// mmproxy of crates.io (mmproxy-rs)
    Mmproxy,
}

/// Where a relay listens and where it goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    /// The relay's address.
    pub(crate) listen: SocketAddrV4,
    /// The service's address.
    pub(crate) service: SocketAddrV4,
    /// How many threads, processes or listeners the relay gets.
    pub(crate) threads: usize,
    /// How many connections it is configured for.
    pub(crate) room: usize,
}

impl Program {
    /// Its column's heading.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Mmproxyctl => "mmproxyctl",
            Self::Haproxy => "haproxy",
            Self::HaproxySplice => "haproxy splice",
            Self::Nginx => "nginx stream",
            Self::GoMmproxy => "go-mmproxy",
            Self::Mmproxy => "mmproxy-rs",
        }
    }

    /// The version that is installed, or why there is none.
    ///
    /// # Errors
    /// When the program is not there: the message says how to get it.
    pub(crate) fn version(self) -> Result<String> {
        match self {
            Self::Direct => Ok(String::new()),
            Self::Mmproxyctl => first_line(Command::new(self.path()).arg("--version")),
            Self::Haproxy | Self::HaproxySplice => first_line(Command::new("haproxy").arg("-v")),
            Self::Nginx => first_line(Command::new("nginx").arg("-v")),
            // it cannot tell itself
            Self::GoMmproxy => first_line(Command::new("dpkg-query").args([
                "-W",
                "-f",
                "${Package} ${Version}",
                "go-mmproxy",
            ])),
            Self::Mmproxy => {
                let list = peers().join(".crates.toml");
                let text = fs::read_to_string(&list)
                    .with_context(|| format!("cannot read {}", list.display()))?;
                text.lines()
                    .find_map(|line| line.strip_prefix("\"mmproxy "))
                    .and_then(|rest| rest.split(' ').next())
                    .map(|version| format!("mmproxy {version} (crates.io)"))
                    .with_context(|| format!("{} does not list mmproxy", list.display()))
            }
        }
        .with_context(|| {
            format!(
                "{} is not installed: run benches/install-peers.sh",
                self.title()
            )
        })
    }

    /// The settings that matter, for the report.
    pub(crate) fn settings(self, threads: usize) -> String {
        match self {
            Self::Direct => "the load connects to the service, no header".to_owned(),
            Self::Mmproxyctl => format!("run --no-check --workers {threads}"),
            Self::Haproxy => {
                format!("nbthread {threads}, accept-proxy, source 0.0.0.0 usesrc client")
            }
            Self::HaproxySplice => {
                format!("as haproxy, with option splice-auto, nbthread {threads}")
            }
            Self::Nginx => format!(
                "worker_processes {threads}, reuseport, proxy_bind $remote_addr transparent, realip"
            ),
            Self::GoMmproxy => format!("-listeners {threads}, -mark {MARK}"),
            Self::Mmproxy => format!("--listeners {MMPROXY_BACKLOG} (its backlog), --mark {MARK}"),
        }
    }

    /// The command that runs it in the foreground, with its files under `dir`; none for the direct row.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(crate) fn command(
        self,
        namespace: &Namespace,
        dir: &Path,
        route: Route,
    ) -> Result<Option<Command>> {
        let write = |name: &str, text: String| -> Result<PathBuf> {
            let path = dir.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            Ok(path)
        };
        let mut command = namespace.command(self.path());
        match self {
            Self::Direct => return Ok(None),
            Self::Mmproxyctl => {
                write("pathways.conf", format!("{MARK} connmark=auto\n"))?;
                write("instances.tsv", instance(route))?;
                write("allow.txt", TRUSTED.to_owned())?;
                command
                    .env_remove("ALLOW_LIST_PATH")
                    .args(["--log-format", "text", "--quiet"])
                    .arg("--config-dir")
                    .arg(dir)
                    .arg("--runtime-dir")
                    .arg(dir.join("run"))
                    // the namespace has the pathway's routes, but not from `pathway add`
                    .args(["run", "--no-check", "--workers", &route.threads.to_string()])
                    .arg("bench");
            }
            Self::Haproxy | Self::HaproxySplice => {
                let splice = self == Self::HaproxySplice;
                let config = write("haproxy.cfg", haproxy(route, splice))?;
                command.args(["-db", "-q", "-f"]).arg(config);
            }
            Self::Nginx => {
                let config = write("nginx.conf", nginx(route, dir))?;
                command
                    .arg("-e")
                    .arg("stderr")
                    .arg("-p")
                    .arg(dir)
                    .arg("-c")
                    .arg(config);
            }
            Self::GoMmproxy => {
                let trusted = write("allow.txt", TRUSTED.to_owned())?;
                command
                    .args(["-l", &route.listen.to_string()])
                    .args(["-4", &route.service.to_string()])
                    .args(["-mark", &MARK.to_string()])
                    .args(["-listeners", &route.threads.to_string()])
                    .arg("-allowed-subnets")
                    .arg(trusted);
            }
            Self::Mmproxy => {
                let trusted = write("allow.txt", TRUSTED.to_owned())?;
                command
                    .args(["--listen-addr", &route.listen.to_string()])
                    .args(["--ipv4", &route.service.to_string()])
                    .args(["--mark", &MARK.to_string()])
                    .args(["--listeners", MMPROXY_BACKLOG])
                    .arg("--allowed-subnets")
                    .arg(trusted);
            }
        }
        Ok(Some(command))
    }

    /// What is started.
    pub(crate) fn path(self) -> PathBuf {
        match self {
            Self::Direct => PathBuf::new(),
            Self::Mmproxyctl => env!("CARGO_BIN_EXE_mmproxyctl").into(),
            Self::Haproxy | Self::HaproxySplice => "haproxy".into(),
            Self::Nginx => "nginx".into(),
            Self::GoMmproxy => "go-mmproxy".into(),
            Self::Mmproxy => peers().join("bin/mmproxy"),
        }
    }
}

/// Where install-peers.sh puts what comes from crates.io.
fn peers() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers")
}

/// No options: the defaults are what is measured.
fn instance(route: Route) -> String {
    format!(
        "bench\t{MARK}\t{}\t{}\t{}\t-\n",
        route.listen,
        route.service.ip(),
        route.service.port()
    )
}

/// No health checks, no log; connections are limited by `maxconn` alone.
fn haproxy(
    Route {
        listen,
        service,
        threads,
        room,
    }: Route,
    splice: bool,
) -> String {
    let splice = if splice {
        "    option splice-auto\n"
    } else {
        ""
    };
    format!(
        "global
    maxconn {room}
    nbthread {threads}
defaults
    mode tcp
    maxconn {room}
    timeout connect 5s
    timeout client 1h
    timeout server 1h
{splice}frontend in
    bind {listen} accept-proxy
    default_backend out
backend out
    source 0.0.0.0 usesrc client
    server service {service}
"
    )
}

/// Workers stay root: binding a foreign address needs CAP_NET_RAW or CAP_NET_ADMIN. The address is kept and
/// the port is not, which is what nginx's own documentation shows for transparency.
fn nginx(
    Route {
        listen,
        service,
        threads,
        room,
    }: Route,
    dir: &Path,
) -> String {
    let dir = dir.display();
    // two descriptors a connection, on any one worker in the worst case
    let room = 2 * room;
    let module = "/usr/lib/nginx/modules/ngx_stream_module.so";
    format!(
        "load_module {module};
user root;
daemon off;
pid {dir}/nginx.pid;
worker_processes {threads};
error_log stderr error;
events {{
    worker_connections {room};
}}
stream {{
    access_log off;
    server {{
        listen {listen} proxy_protocol reuseport backlog=65535;
        set_real_ip_from 127.0.0.0/8;
        proxy_bind $remote_addr transparent;
        proxy_timeout 1h;
        proxy_pass {service};
    }}
}}
"
    )
}

/// The first line a program prints, on either stream (nginx uses stderr).
fn first_line(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!("{name} ended with {}", output.status);
    }
    let text = if output.stdout.is_empty() {
        output.stderr
    } else {
        output.stdout
    };
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().next().unwrap_or_default().trim();
    // HAProxy adds its date and address
    Ok(line.split(" 20").next().unwrap_or(line).to_owned())
}
