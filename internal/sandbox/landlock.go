package sandbox

import (
	"errors"
	"fmt"
	"os"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
)

// The rights of Landlock. Those of devices are for images on block devices,
// whose size is asked by an ioctl.
const (
	readFile  = ll.AccessFSReadFile | ll.AccessFSIoctlDev
	readDir   = readFile | ll.AccessFSReadDir
	writeFile = ll.AccessFSWriteFile | ll.AccessFSTruncate
	writeDir  = writeFile | ll.AccessFSMakeReg
	changeDir = writeDir | ll.AccessFSMakeDir | ll.AccessFSRemoveFile | ll.AccessFSRemoveDir
)

// signalErratum is set where threads of one process may always signal each
// other (Landlock's erratum 2, Linux 6.15 and stable releases).
const signalErratum = 1 << 1

// restrictFiles leaves what the policy names and refuses every other file, all
// TCP, and signals and abstract sockets of other processes, as far as the
// kernel's version of Landlock knows these.
func restrictFiles(p Policy) error {
	abi, err := ll.LandlockGetABIVersion()
	if err != nil || abi < 1 {
		return errors.New("this kernel does not offer it")
	}
	// For psx, see the package comment.
	rules := []landlock.Rule{landlock.PathAccess(ll.AccessFSReadDir, "/proc").IgnoreIfMissing()}
	for _, path := range p.List {
		rules = append(rules, landlock.PathAccess(ll.AccessFSReadDir, path))
	}
	for _, path := range p.Exec {
		rules = append(rules, landlock.PathAccess(ll.AccessFSExecute|ll.AccessFSReadFile, path))
	}
	for _, set := range []struct {
		paths     []string
		file, dir landlock.AccessFSSet
	}{{p.Read, readFile, readDir}, {p.Write, readFile | writeFile, readDir | writeDir}, {p.Change, readFile | writeFile, readDir | changeDir}} {
		for _, path := range set.paths {
			st, err := os.Stat(path)
			if err != nil {
				return err
			}
			rights := set.file
			if st.IsDir() {
				rights = set.dir
			}
			rules = append(rules, landlock.PathAccess(rights, path))
		}
	}
	config := landlock.V11
	if errata, err := ll.LandlockGetErrata(); abi < 8 && (err != nil || errata&signalErratum == 0) {
		// Such a kernel takes the threads of one process for strangers, and
		// psx would wait for ever for the signals that it sends to them.
		config = landlock.V5
	}
	if err := config.BestEffort().Restrict(rules...); err != nil {
		return fmt.Errorf("version %d: %w", abi, err)
	}
	return nil
}

// Available reports whether Require can be fulfilled here.
func Available() bool {
	abi, err := ll.LandlockGetABIVersion()
	return err == nil && abi >= 1 && auditArch != 0
}
