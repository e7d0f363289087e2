//! Hosts as network namespaces, wired with veth pairs; programs and closures that run inside them.

use std::ffi::OsStr;
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use mmproxyctl::pathway::Firewall;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// A network namespace that lives as long as the value; `lo` is up, IPv6 addresses are usable at once.
#[derive(Clone)]
pub(crate) struct Host {
    name: &'static str,
    namespace: Arc<File>,
    firewall: Firewall,
    scratch: Arc<tempfile::TempDir>,
}

impl Host {
    /// A fresh namespace with `lo` up. Panics without root.
    pub(crate) fn new(name: &'static str) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests build network namespaces: run them as root (sudo ./tests/run.sh)"
        );
        let namespace = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare a network namespace");
            File::open("/proc/thread-self/ns/net").expect("open the namespace")
        })
        .join()
        .expect("namespace thread");
        let host = Self {
            name,
            namespace: Arc::new(namespace),
            firewall: Firewall::Auto,
            scratch: Arc::new(tempfile::tempdir().expect("scratch directory")),
        };
        host.ip("link set lo up");
        host.sysctl("net.ipv6.conf.all.accept_dad", "0");
        host.sysctl("net.ipv6.conf.default.accept_dad", "0");
        host
    }

    /// The same, where pathways are made with this choice of a firewall.
    pub(crate) fn with(self, firewall: Firewall) -> Self {
        Self { firewall, ..self }
    }

    /// The choice of a firewall.
    pub(crate) fn firewall(&self) -> Firewall {
        self.firewall
    }

    /// A directory of this host's own, removed with it: configuration, logs, runtime files.
    pub(crate) fn dir(&self) -> &Path {
        self.scratch.path()
    }

    /// Writes a file under [`Host::dir`] and returns its path.
    pub(crate) fn write(&self, path: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir().join(path);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("create directory");
        std::fs::write(&path, text).expect("write file");
        path
    }

    /// Runs a closure on a thread inside this namespace. Sockets it makes stay in the namespace.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(self.namespace.as_fd(), CloneFlags::CLONE_NEWNET)
                        .expect("enter the namespace");
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A command that will run inside this namespace.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let namespace = Arc::clone(&self.namespace);
        // SAFETY: setns is async-signal-safe; the descriptor is kept open by the closure
        #[expect(
            unsafe_code,
            reason = "pre_exec is the only way to start a child in another namespace"
        )]
        unsafe {
            command.pre_exec(move || Ok(setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?));
        }
        command
    }

    /// Runs words split at white space, whatever the outcome.
    pub(crate) fn try_run(&self, words: &str) -> Output {
        let mut words = words.split_whitespace();
        let program = words.next().expect("a program");
        self.command(program)
            .args(words)
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|error| panic!("{program}: {error}: install it (./tests/run.sh does)"))
    }

    /// Runs words split at white space, panics unless they succeed, returns stdout.
    pub(crate) fn run(&self, words: &str) -> String {
        let output = self.try_run(words);
        assert!(
            output.status.success(),
            "{}: {words}: {}\n{}{}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// `ip …`.
    pub(crate) fn ip(&self, words: &str) -> String {
        self.run(&format!("ip {words}"))
    }

    /// Sets a sysctl of this namespace, by its dotted name.
    pub(crate) fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        self.enter(|| {
            std::fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"))
        });
    }

    /// Adds an address with prefix length to an interface, usable at once.
    pub(crate) fn address(&self, interface: &str, address: &str) {
        let nodad = if address.contains(':') { "nodad" } else { "" };
        self.ip(&format!("address add {address} dev {interface} {nodad}"));
    }

    /// Connects two hosts with a veth pair and gives each end its addresses (`a.b.c.d/n`, `v6/n`).
    pub(crate) fn link(
        &self,
        interface: &str,
        addresses: &[&str],
        peer: &Host,
        peer_interface: &str,
        peer_addresses: &[&str],
    ) {
        let target = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            peer.namespace.as_raw_fd()
        );
        self.ip(&format!(
            "link add {interface} type veth peer name {peer_interface} netns {target}"
        ));
        for (host, interface, addresses) in [
            (self, interface, addresses),
            (peer, peer_interface, peer_addresses),
        ] {
            for address in addresses {
                host.address(interface, address);
            }
            host.ip(&format!("link set {interface} up"));
        }
        for (host, interface) in [(self, interface), (peer, peer_interface)] {
            // the carrier reaches the other end through a work queue: until then IPv6 has no route
            let show = format!("address show dev {interface}");
            wait_for(&format!("{}: carrier on {interface}", host.name), || {
                let shown = host.ip(&show);
                shown.contains("state UP") && !shown.contains("tentative")
            });
        }
    }

    /// Starts a program that ends with the returned value; its output goes to `NAME.log` under [`Host::dir`].
    pub(crate) fn spawn(&self, mut command: Command) -> Running {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let program = command.get_program().to_string_lossy().into_owned();
        let short = program.rsplit('/').next().unwrap_or("program").to_owned();
        let log = self.dir().join(format!(
            "{short}-{}.log",
            NUMBER.fetch_add(1, Ordering::Relaxed)
        ));
        let out = File::create(&log).expect("create log");
        let child = command
            // a group of its own, so that a master's workers end with it
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(out.try_clone().expect("clone log"))
            .stderr(out)
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}: install it (./tests/run.sh does)"));
        Running {
            program: short,
            child,
            log,
        }
    }

    /// The mmproxyctl under test, with its configuration and runtime directory under [`Host::dir`].
    pub(crate) fn mmproxyctl(&self, words: &str) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_mmproxyctl"));
        command
            .env_remove("MMPROXY_CONFIG_DIR")
            .env_remove("RUNTIME_DIRECTORY")
            .env_remove("ALLOW_LIST_PATH")
            .env_remove("MMPROXY_SET_SYSCTLS")
            .env("MMPROXY_FIREWALL", self.firewall.name())
            .arg("--config-dir")
            .arg(self.dir().join("etc"))
            .arg("--runtime-dir")
            .arg(self.dir().join("run"))
            .args(words.split_whitespace());
        command
    }

    /// Waits until a TCP listener is there (`ss -ltn`), at most ten seconds.
    pub(crate) fn wait_listening(&self, port: u16) {
        let filter = format!("ss -Hltn sport = :{port}");
        wait_for(&format!("{}: a listener on port {port}", self.name), || {
            !self.run(&filter).is_empty()
        });
    }

    /// Whether an address answers a TCP connect from this host within a second.
    pub(crate) fn can_connect(&self, addr: IpAddr, port: u16) -> bool {
        self.enter(|| {
            std::net::TcpStream::connect_timeout(&(addr, port).into(), Duration::from_secs(1))
                .is_ok()
        })
    }
}

/// A program that is killed when the value goes.
pub(crate) struct Running {
    program: String,
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Its process id.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// What it has written so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).expect("read log")
    }

    /// Waits until its output contains a text, at most ten seconds.
    pub(crate) fn wait_log(&self, text: &str) {
        wait_for(
            &format!(
                "'{text}' in the output of {}:\n{}",
                self.program,
                self.log()
            ),
            || self.log().contains(text),
        );
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("send the signal");
    }

    /// Waits for its end, at most `limit`.
    pub(crate) fn wait(&mut self, limit: Duration) -> ExitStatus {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status;
            }
            assert!(
                Instant::now() < end,
                "{} still runs after {limit:?}:\n{}",
                self.program,
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SIGKILL of nginx's master alone would leave its workers behind
        let _ = killpg(self.pid(), Signal::SIGKILL);
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!(
                "--- {} wrote:\n{}",
                self.program,
                std::fs::read_to_string(&self.log).unwrap_or_default()
            );
        }
    }
}

/// Waits for a condition, at most ten seconds.
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < end, "waited ten seconds for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn two_hosts_reach_each_other() {
    let (left, right) = (Host::new("left"), Host::new("right"));
    left.link(
        "eth0",
        &["10.0.0.1/24", "fd00::1/64"],
        &right,
        "eth0",
        &["10.0.0.2/24", "fd00::2/64"],
    );
    let listener = right.enter(|| std::net::TcpListener::bind("[::]:7").expect("bind"));
    assert!(left.can_connect("10.0.0.2".parse().unwrap(), 7));
    assert!(left.can_connect("fd00::2".parse().unwrap(), 7));
    assert!(!left.can_connect("10.0.0.2".parse().unwrap(), 8));
    drop(listener);
}
