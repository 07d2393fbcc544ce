package sandbox

import (
	"os"

	"golang.org/x/sys/unix"
)

// rule refuses one system call, always or by one of its arguments. Of an
// argument the low 32 bits are looked at, all that the kernel uses of those
// named here.
type rule struct {
	nr    uint32
	errno unix.Errno // EPERM if 0
	test  test
	arg   int
	value uint32
}

type test uint8

const (
	always    test = iota
	unlessBit      // refused unless the argument has a bit of value
	ifBit          // refused if the argument has a bit of value
	unlessIs       // refused unless the argument is value
	ifIs           // refused if the argument is value
)

// Offsets in struct seccomp_data, linux/seccomp.h.
const (
	dataNr   = 0
	dataArch = 4
	dataArgs = 16
)

// compile makes the classic BPF program of the rules. The first rule that
// refuses decides; what none refuses is allowed.
func compile(rules []rule) []unix.SockFilter {
	const (
		load   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		isEq   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		isGe   = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
		hasBit = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		ret    = unix.BPF_RET | unix.BPF_K
	)
	refuse := func(e unix.Errno) unix.SockFilter {
		if e == 0 {
			e = unix.EPERM
		}
		return unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ERRNO | uint32(e)}
	}
	p := []unix.SockFilter{
		// Numbers mean something else in another architecture's calls.
		{Code: load, K: dataArch},
		{Code: isEq, K: auditArch, Jt: 1},
		{Code: ret, K: unix.SECCOMP_RET_KILL_PROCESS},
		{Code: load, K: dataNr},
		// The x32 calls of amd64, second numbers for the same calls.
		{Code: isGe, K: firstForeign, Jf: 1},
		refuse(unix.ENOSYS),
	}
	for _, r := range rules {
		arg := unix.SockFilter{Code: load, K: dataArgs + 8*uint32(r.arg)} // little-endian: the low half first
		again := unix.SockFilter{Code: load, K: dataNr}
		switch r.test {
		case always:
			p = append(p, unix.SockFilter{Code: isEq, K: r.nr, Jf: 1}, refuse(r.errno))
		case unlessBit, unlessIs:
			code := uint16(hasBit)
			if r.test == unlessIs {
				code = isEq
			}
			p = append(p, unix.SockFilter{Code: isEq, K: r.nr, Jf: 4}, arg,
				unix.SockFilter{Code: code, K: r.value, Jt: 1}, refuse(r.errno), again)
		case ifBit, ifIs:
			code := uint16(hasBit)
			if r.test == ifIs {
				code = isEq
			}
			p = append(p, unix.SockFilter{Code: isEq, K: r.nr, Jf: 4}, arg,
				unix.SockFilter{Code: code, K: r.value, Jf: 1}, refuse(r.errno), again)
		}
	}
	return append(p, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW})
}

func all(numbers ...uint32) []rule {
	rules := make([]rule, len(numbers))
	for i, nr := range numbers {
		rules[i].nr = nr
	}
	return rules
}

// confineRules refuse what no program that only reads and writes images does.
func confineRules(policy Policy) []rule {
	rules := all(
		// Programs and processes. clone is for threads only; clone3, whose
		// flags no filter can see, is said not to exist, and libraries then
		// use clone.
		unix.SYS_EXECVEAT,
		// Other processes.
		unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PROCESS_MADVISE,
		unix.SYS_KCMP, unix.SYS_PIDFD_OPEN, unix.SYS_PIDFD_GETFD, unix.SYS_PIDFD_SEND_SIGNAL,
		unix.SYS_RT_SIGQUEUEINFO, unix.SYS_RT_TGSIGQUEUEINFO,
		// Connections; those that exist stay usable.
		unix.SYS_SOCKET, unix.SYS_SOCKETPAIR, unix.SYS_CONNECT, unix.SYS_BIND, unix.SYS_LISTEN,
		unix.SYS_ACCEPT, unix.SYS_ACCEPT4,
		// What would run system calls past this filter.
		unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_REGISTER,
		// The tree of files and name spaces.
		unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT,
		unix.SYS_FSOPEN, unix.SYS_FSMOUNT, unix.SYS_FSCONFIG, unix.SYS_FSPICK, unix.SYS_OPEN_TREE,
		unix.SYS_MOVE_MOUNT, unix.SYS_MOUNT_SETATTR, unix.SYS_UNSHARE, unix.SYS_SETNS,
		unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD,
		unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_MKNODAT, unix.SYS_SYMLINKAT, unix.SYS_LINKAT,
		unix.SYS_FCHOWN, unix.SYS_FCHOWNAT,
		unix.SYS_SETXATTR, unix.SYS_LSETXATTR, unix.SYS_FSETXATTR,
		unix.SYS_REMOVEXATTR, unix.SYS_LREMOVEXATTR, unix.SYS_FREMOVEXATTR, unix.SYS_FANOTIFY_INIT,
		// The kernel.
		unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
		unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
		unix.SYS_KEXEC_LOAD, unix.SYS_REBOOT, unix.SYS_SYSLOG, unix.SYS_ACCT, unix.SYS_PERSONALITY,
		unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME,
		unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME, unix.SYS_VHANGUP,
		unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL,
		// Memory that is shared by name.
		unix.SYS_SHMGET, unix.SYS_SHMAT, unix.SYS_MSGGET, unix.SYS_SEMGET, unix.SYS_MQ_OPEN,
	)
	rules = append(rules, legacyConfine()...)
	if !policy.Rings {
		rules = append(rules, rule{nr: unix.SYS_IO_URING_ENTER})
	}
	if len(policy.Exec) == 0 {
		rules = append(rules, all(unix.SYS_EXECVE, unix.SYS_PRLIMIT64)...)
	} else {
		// Its own limits, which are set by now, a program may ask for.
		rules = append(rules, rule{nr: unix.SYS_PRLIMIT64, test: unlessIs, arg: 0, value: 0})
	}
	if len(policy.Change) == 0 {
		rules = append(rules, all(unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHMODAT2)...)
	}
	// A program that runs as its owner, root say, for whoever starts it.
	rules = append(rules,
		rule{nr: unix.SYS_OPENAT, test: ifBit, arg: 3, value: setID},
		rule{nr: unix.SYS_FCHMOD, test: ifBit, arg: 1, value: setID},
		rule{nr: unix.SYS_FCHMODAT, test: ifBit, arg: 2, value: setID},
		rule{nr: unix.SYS_FCHMODAT2, test: ifBit, arg: 2, value: setID},
		// The mode is in memory, which no filter sees; libraries fall back.
		rule{nr: unix.SYS_OPENAT2, errno: unix.ENOSYS})
	self := uint32(os.Getpid())
	return append(rules,
		rule{nr: unix.SYS_CLONE3, errno: unix.ENOSYS},
		rule{nr: unix.SYS_CLONE, test: unlessBit, arg: 0, value: unix.CLONE_THREAD},
		// Go's runtime sends signals to threads of its own.
		rule{nr: unix.SYS_KILL, test: unlessIs, arg: 0, value: self},
		rule{nr: unix.SYS_TGKILL, test: unlessIs, arg: 0, value: self},
		// Typing into somebody's terminal.
		rule{nr: unix.SYS_IOCTL, test: ifIs, arg: 1, value: unix.TIOCSTI},
		rule{nr: unix.SYS_IOCTL, test: ifIs, arg: 1, value: tioclinux},
	)
}

const setID = unix.S_ISUID | unix.S_ISGID

// tioclinux is TIOCLINUX of ioctl_console(2), which can type as well.
const tioclinux = 0x541c

// sealRules refuse also every way to open or change a file by its name, to
// receive descriptors, and to make code executable.
func sealRules() []rule {
	rules := all(
		unix.SYS_OPENAT, unix.SYS_OPENAT2, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2,
		unix.SYS_MKDIRAT, unix.SYS_TRUNCATE, unix.SYS_UTIMENSAT, unix.SYS_CHDIR, unix.SYS_FCHDIR,
		unix.SYS_STATFS, unix.SYS_READLINKAT, unix.SYS_FACCESSAT, unix.SYS_FACCESSAT2, unix.SYS_GETDENTS64,
		unix.SYS_GETXATTR, unix.SYS_LGETXATTR, unix.SYS_LISTXATTR, unix.SYS_LLISTXATTR, unix.SYS_INOTIFY_ADD_WATCH,
		unix.SYS_RECVMSG, unix.SYS_RECVMMSG, unix.SYS_RECVFROM, unix.SYS_SENDMSG, unix.SYS_SENDMMSG, unix.SYS_SENDTO,
		unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETREUID, unix.SYS_SETREGID, unix.SYS_SETRESUID,
		unix.SYS_SETRESGID, unix.SYS_SETGROUPS, unix.SYS_CAPSET, unix.SYS_MEMFD_CREATE,
		// psx has done its work: it signals threads by this call.
		unix.SYS_TKILL,
	)
	rules = append(rules, legacySeal()...)
	return append(rules,
		rule{nr: unix.SYS_MMAP, test: ifBit, arg: 2, value: unix.PROT_EXEC},
		rule{nr: unix.SYS_MPROTECT, test: ifBit, arg: 2, value: unix.PROT_EXEC},
		rule{nr: unix.SYS_PKEY_MPROTECT, test: ifBit, arg: 2, value: unix.PROT_EXEC},
	)
}
