package open

import (
	"os"
	"path/filepath"

	"github.com/imagestack/imagestack/backend"
)

// Access is what opening an image may touch, for a process that gives up
// everything else before it looks at the image. All paths are absolute and
// free of symbolic links; a directory stands for what lies below it.
type Access struct {
	List  []string // directories whose names are read
	Read  []string // files and directories that are read
	Write []string // files and directories that are written
}

// AccessTo is what Open of the image at path with these options may touch:
// the image, its directory and the allowed ones. An external data file can lie
// in any of them, so all are writable when the image is. A throw-away layer
// has to be made before, see Options.ScratchFile.
func AccessTo(path string, o Options) (Access, error) {
	var a Access
	st, err := os.Stat(path)
	if err != nil {
		return a, err
	}
	image, err := realPath(path)
	if err != nil {
		return a, err
	}
	files := []string{image}
	if !st.IsDir() {
		// As newPolicy has it: the directory of the name, not that of what a
		// symbolic link leads to.
		dir, err := realPath(filepath.Dir(path))
		if err != nil {
			return a, err
		}
		if st.Mode().IsRegular() {
			files = append(files, dir)
		} else {
			a.List = append(a.List, dir) // /dev: nothing else there is the image's
		}
	}
	for _, d := range o.AllowPaths {
		real, err := realPath(d)
		if err != nil {
			return a, err
		}
		files = append(files, real)
	}
	if o.Writable && !o.Scratch {
		a.Write = files
	} else {
		a.Read = files
	}
	return a, nil
}

func realPath(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	return filepath.Abs(real)
}

// NewScratchFile makes the file that Open would make for Options.Scratch or
// Options.Flat, for Options.ScratchFile. It is gone when it is closed.
func NewScratchFile(path string, o Options) (backend.File, error) {
	dir, err := scratchDir(path, o)
	if err != nil {
		return nil, err
	}
	return scratchFile(dir)
}
