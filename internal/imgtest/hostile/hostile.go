// Package hostile makes images that try to get the better of who reads them:
// lying headers, tables that lead astray, names that lead out of the
// directory, loops, bombs. Each comes with what the tools must answer.
//
// Design note. A case is data: a name, a function that writes files, the
// argument for the tools, and the exit codes and words that are expected. It
// knows nothing of the code under test; images are built here byte by byte
// (qcow2.go, ploop.go, bundle.go, disks.go) from the specifications. The runner
// is in test/.
package hostile

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
)

// Tool is a command line that every case is given to.
type Tool string

// The tools.
const (
	Info       Tool = "image-stack info"
	Map        Tool = "image-stack map"
	Mount      Tool = "mount-image"
	Partitions Tool = "mount-image --partitions"
	Write      Tool = "mount-image -w"
	Fsck       Tool = "image-fsck -n"
	Estimate   Tool = "image-compact -n"
	Compact    Tool = "image-compact"
	Repair     Tool = "image-fsck -y" // the last, because it changes the image
)

// Tools are all of them.
func Tools() []Tool {
	return []Tool{Info, Map, Mount, Partitions, Write, Fsck, Estimate, Compact, Repair}
}

// Class says what kind of harm a case is about.
type Class string

// The classes.
const (
	Header Class = "header" // fields that lie
	Table  Class = "table"  // maps and tables that lead astray
	Bomb   Class = "bomb"   // memory or time
	Path   Class = "path"   // files that are nobody's business
	Chain  Class = "chain"  // loops and depth of parents
	Disk   Class = "disk"   // partition tables
	Guest  Class = "guest"  // filesystems in the image
)

// Dirs are where a case is built.
type Dirs struct {
	In      string // the directory of the image
	Outside string // beside In; holds Secret
}

// Secret is a file in Dirs.Outside that no tool may open, and SecretText what
// it begins with.
const (
	Secret     = "secret.raw"
	SecretText = "this must never be seen"
)

// Case is a hostile image.
type Case struct {
	Name  string
	Class Class
	Build func(d Dirs) error
	Image string   // argument for the tools, relative to Dirs.In
	Args  []string // further flags
	// Exit is the exit code of every tool that neither By nor exits.txt mentions.
	Exit int
	By   map[Tool]int
	// Words are in the message of every tool that fails.
	Words []string
}

// Want is the exit code that the tool must have. ok is false where nobody has
// written it down.
func (c Case) Want(t Tool) (exit int, ok bool) {
	if e, ok := c.By[t]; ok {
		return e, true
	}
	if Recorded(t) {
		e, ok := recorded()[c.Name][t]
		return e, ok
	}
	return c.Exit, true
}

// Cases are all of them.
func Cases() []Case {
	var all []Case
	for _, some := range [][]Case{qcow2Headers(), qcow2Tables(), qcow2Bombs(), qcow2Paths(), chains(), ploopHeaders(), bundles(), disks(), guests(), odd()} {
		all = append(all, some...)
	}
	return all
}

// Prepare makes the directories of a case under root and builds it.
func (c Case) Prepare(root string) (Dirs, error) {
	d := Dirs{In: filepath.Join(root, "in"), Outside: filepath.Join(root, "outside")}
	for _, dir := range []string{d.In, d.Outside} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return d, err
		}
	}
	secret := make([]byte, 1<<20)
	copy(secret, SecretText)
	if err := os.WriteFile(filepath.Join(d.Outside, Secret), secret, 0o644); err != nil {
		return d, err
	}
	return d, c.Build(d)
}

// chunk is a part of a file that is not zeros.
type chunk struct {
	off  int64
	data []byte
}

// file builds a file. Of the content only what is not zeros is kept, because
// all cases together would be a lot.
func file(name string, content []byte) func(Dirs) error {
	var chunks []chunk
	const unit = 512
	zeros := make([]byte, unit)
	for off := 0; off < len(content); off += unit {
		part := content[off:min(off+unit, len(content))]
		switch n := len(chunks); {
		case bytes.Equal(part, zeros[:len(part)]):
		case n > 0 && chunks[n-1].off+int64(len(chunks[n-1].data)) == int64(off):
			chunks[n-1].data = append(chunks[n-1].data, part...)
		default:
			chunks = append(chunks, chunk{int64(off), bytes.Clone(part)})
		}
	}
	size := int64(len(content))
	return func(d Dirs) error {
		f, err := os.OpenFile(filepath.Join(d.In, name), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
		if err != nil {
			return err
		}
		for _, c := range chunks {
			if _, err := f.WriteAt(c.data, c.off); err != nil {
				_ = f.Close()
				return err
			}
		}
		return errors.Join(f.Truncate(size), f.Close())
	}
}

// both does several builds.
func both(builds ...func(Dirs) error) func(Dirs) error {
	return func(d Dirs) error {
		for _, b := range builds {
			if err := b(d); err != nil {
				return err
			}
		}
		return nil
	}
}

// exits are the exit codes of the tools but image-fsck, in the order info, map,
// mount-image, mount-image -w.
func exits(info, m, mount, write int) map[Tool]int {
	return map[Tool]int{Info: info, Map: m, Mount: mount, Write: write}
}
