//! What this process takes of the machine's memory, and what is free.

use std::path::{Component, Path, PathBuf};

/// Reads a line such as `VmHWM:  1234 kB` of a file under /proc, in bytes.
fn proc_bytes(path: &Path, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kilobytes: u64 = line.trim_start_matches(':').trim().trim_end_matches(" kB").trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// Bytes resident now, where the system tells.
pub fn resident() -> Option<u64> {
    proc_bytes(Path::new("/proc/self/status"), "VmRSS")
}

/// The most bytes that have been resident, where the system tells.
pub fn peak_resident() -> Option<u64> {
    proc_bytes(Path::new("/proc/self/status"), "VmHWM").or_else(peak_from_usage)
}

#[cfg(unix)]
fn peak_from_usage() -> Option<u64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the pointer is valid, and a zeroed rusage is a valid value.
    let usage = unsafe {
        if libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) != 0 {
            return None;
        }
        usage.assume_init()
    };
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    Some(usage.ru_maxrss as u64 * unit)
}

#[cfg(not(unix))]
fn peak_from_usage() -> Option<u64> {
    None
}

/// Bytes that this process can still take without swapping or being killed, where the system tells: what the machine has free, or what the
/// control group that the process runs in (a container, a batch job) leaves of it.
pub fn available() -> Option<u64> {
    available_under(Path::new("/proc"), Path::new("/sys/fs/cgroup"))
}

/// As [`available`], with the places where Linux tells of processes and of control groups.
fn available_under(proc: &Path, cgroups: &Path) -> Option<u64> {
    let machine = proc_bytes(&proc.join("meminfo"), "MemAvailable");
    let of_process = std::fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default();
    // A line is `hierarchy:controllers:path`; version 2 is hierarchy 0 and names no controllers.
    let groups = of_process.lines().filter_map(|line| {
        let (hierarchy, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        if hierarchy == "0" && controllers.is_empty() {
            return free_in_group(cgroups, path, &VERSION_2);
        }
        let is_memory = controllers.split(',').any(|controller| controller == "memory");
        is_memory.then(|| free_in_group(&cgroups.join("memory"), path, &VERSION_1)).flatten()
    });
    machine.into_iter().chain(groups).min()
}

/// The files in which a version of control groups tells of memory.
struct GroupFiles {
    limit: &'static str,
    usage: &'static str,
    /// Keys of `memory.stat`: pages of files, which the kernel takes back before it kills.
    file_pages: [&'static str; 2],
}

const VERSION_2: GroupFiles =
    GroupFiles { limit: "memory.max", usage: "memory.current", file_pages: ["active_file", "inactive_file"] };
const VERSION_1: GroupFiles = GroupFiles {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    file_pages: ["total_active_file", "total_inactive_file"],
};

/// The least that a group and the groups above it leave free; `None` where none has a limit.
///
/// In a container the path may be that of the host, of which the container sees only the last part, as the root: each level that is not
/// there is passed over, up to the root.
fn free_in_group(root: &Path, path: &str, files: &GroupFiles) -> Option<u64> {
    let parts = Path::new(path).components().filter(|part| matches!(part, Component::Normal(_)));
    let group = root.join(parts.collect::<PathBuf>());
    let levels = group.ancestors().take_while(|level| level.starts_with(root));
    levels.filter_map(|level| free_at_level(level, files)).min()
}

fn free_at_level(level: &Path, files: &GroupFiles) -> Option<u64> {
    let number = |name: &str| std::fs::read_to_string(level.join(name)).ok()?.trim().parse::<u64>().ok();
    // "max" is no number: there is no limit. Version 1 has a number larger than any memory for that.
    let (limit, usage) = (number(files.limit)?, number(files.usage)?);
    let stat = std::fs::read_to_string(level.join("memory.stat")).unwrap_or_default();
    let pages = |key: &str| {
        let line = stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        line.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let file_pages = files.file_pages.iter().fold(0u64, |sum, key| sum.saturating_add(pages(key)));
    Some(limit.saturating_sub(usage.saturating_sub(file_pages)))
}

/// Bytes as people read them.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (bytes as f64 / 1e3, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1e3;
        unit += 1;
    }
    if value < 10.0 { format!("{value:.1} {}", UNITS[unit]) } else { format!("{value:.0} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        let texts = [0, 999, 1000, 9_949, 12_345, 999_499, 999_500, 5_350_000_000].map(human);
        assert_eq!(texts, ["0 B", "999 B", "1.0 kB", "9.9 kB", "12 kB", "999 kB", "1.0 MB", "5.3 GB"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_process_knows_its_own_size() {
        let (now, peak) = (resident().unwrap(), peak_resident().unwrap());
        assert!(now > 1 << 20 && peak >= now);
        assert!(available().unwrap() > 0);
    }

    /// A machine with 8 GB free and the given groups, as files with their contents.
    fn available_with(cgroup: &str, files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().unwrap();
        let all = [("proc/meminfo", "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n"), ("proc/self/cgroup", cgroup)];
        for (name, text) in all.iter().chain(files) {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        available_under(&root.path().join("proc"), &root.path().join("cgroup"))
    }

    const MACHINE: Option<u64> = Some(8_000_000 * 1024);

    #[test]
    fn a_group_of_version_2_limits_what_is_free_and_so_do_those_above_it() {
        let job = "0::/batch/job\n";
        assert_eq!(available_with(job, &[]), MACHINE);
        let unlimited = [("cgroup/batch/job/memory.max", "max\n"), ("cgroup/batch/job/memory.current", "5\n")];
        assert_eq!(available_with(job, &unlimited), MACHINE);
        let own = [("cgroup/batch/job/memory.max", "3000\n"), ("cgroup/batch/job/memory.current", "1000\n")];
        assert_eq!(available_with(job, &own), Some(2000));
        // What the group has in pages of files is given back when it is needed.
        let stat = ("cgroup/batch/job/memory.stat", "anon 250\nactive_file 150\ninactive_file 600\n");
        assert_eq!(available_with(job, &[own[0], own[1], stat]), Some(2750));
        let above = [("cgroup/batch/memory.max", "2500\n"), ("cgroup/batch/memory.current", "2000\n")];
        assert_eq!(available_with(job, &[own[0], own[1], above[0], above[1]]), Some(500));
        assert_eq!(available_with(job, &[unlimited[0], unlimited[1], above[0], above[1]]), Some(500));
        let exceeded = [("cgroup/batch/memory.max", "2500\n"), ("cgroup/batch/memory.current", "2600\n")];
        assert_eq!(available_with(job, &exceeded), Some(0));
        // A group as large as the machine is no limit of its own.
        let large = [("cgroup/batch/job/memory.max", "99999999999999\n"), ("cgroup/batch/job/memory.current", "0\n")];
        assert_eq!(available_with(job, &large), MACHINE);
    }

    #[test]
    fn a_container_sees_its_group_as_the_root() {
        let root = [("cgroup/memory.max", "3000\n"), ("cgroup/memory.current", "1000\n")];
        for path in ["0::/\n", "0::/system.slice/docker-1.scope\n", "0::/../../outside\n"] {
            assert_eq!(available_with(path, &root), Some(2000), "{path}");
        }
    }

    #[test]
    fn a_group_of_version_1_limits_what_is_free() {
        let groups = "12:cpu,cpuacct:/job\n7:memory:/job\n1:name=systemd:/init.scope\n0::/init.scope\n";
        let limit = ("cgroup/memory/job/memory.limit_in_bytes", "3000\n");
        let usage = ("cgroup/memory/job/memory.usage_in_bytes", "1000\n");
        let stat = ("cgroup/memory/job/memory.stat", "active_file 1\ntotal_active_file 100\ntotal_inactive_file 200\n");
        assert_eq!(available_with(groups, &[limit, usage, stat]), Some(2300));
        let none = ("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(available_with(groups, &[none, ("cgroup/memory/memory.usage_in_bytes", "5\n")]), MACHINE);
        assert_eq!(available_with("7:cpu:/job\n", &[limit, usage]), MACHINE);
    }

    #[test]
    fn a_system_that_tells_nothing_has_no_number() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(available_under(root.path(), root.path()), None);
    }
}
