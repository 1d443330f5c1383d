// The pybind11 module sait_kernels._C (sait_kernels._emulated in `make emulate`): build facts and CPU features. Importing
// it registers the torch ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "cpu/runtime.h"
#include "ops/torch.h"
#include "sait/compact_attention.h"
#include "sait/device.h"

#ifndef SAIT_CUDA_VERSION
#define SAIT_CUDA_VERSION ""
#endif
#ifndef SAIT_CUDA_ARCHS
#define SAIT_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace {

// Something that was looked at, and can be looked at again.
class Watched {
 public:
  virtual ~Watched() = default;
  virtual bool unchanged() const = 0;
};

// A hash over samples of several pieces of memory, which somebody else keeps alive: at most kWords words of each,
// evenly spread, the first and the last among them. An optimizer's step changes nearly every weight, so the hash shows
// that there was one, whoever made it.
class Sample : public Watched {
 public:
  explicit Sample(std::vector<std::pair<uintptr_t, int64_t>> pieces) : pieces_(std::move(pieces)), seen_(hash()) {}

  bool unchanged() const override { return hash() == seen_; }

 private:
  uint64_t hash() const {
    uint64_t lanes[kLanes] = {};  // taken in turns, for each step of a lane has to wait for the lane's step before
    for (const auto& [address, bytes] : pieces_) {
      const char* data = reinterpret_cast<const char*>(address);
      const int64_t words = bytes / kWordBytes, taken = std::min(words, kWords);
      const int64_t stride = taken < 2 ? 0 : (words - 1) / (taken - 1);
      for (int64_t i = 0; i < taken; ++i) {
        const int64_t word = i + 1 < taken ? i * stride : words - 1;
        uint64_t value;
        std::memcpy(&value, data + word * kWordBytes, kWordBytes);
        lanes[i % kLanes] = mixed(lanes[i % kLanes], value);
      }
      uint64_t rest = 0;
      std::memcpy(&rest, data + words * kWordBytes, bytes - words * kWordBytes);
      lanes[0] = mixed(lanes[0], rest);
    }
    uint64_t hash = 0xcbf29ce484222325;
    for (const uint64_t lane : lanes) hash = mixed(hash, lane);
    return hash;
  }

  static constexpr int64_t kWords = 64, kWordBytes = 8, kLanes = 8;

  static uint64_t mixed(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15;
    return hash ^ (hash >> 32);
  }

  std::vector<std::pair<uintptr_t, int64_t>> pieces_;
  uint64_t seen_;
};

// Remembers what some dictionaries hold (the first of them without one key), the classes of some objects, that other
// dictionaries are empty, and where some tensors lie; and tells whether all that is unchanged, in a third of the time
// that Python takes for the same comparison. All of it is kept alive.
class Held : public Watched {
 public:
  Held(const py::list& dictionaries, bool by_identity, const py::object& ignored, const py::list& objects,
       const py::list& empty, const py::list& tensors)
      : by_identity_(by_identity), ignored_(ignored) {
    for (const py::handle dictionary : dictionaries) {
      Dictionary& seen = dictionaries_.emplace_back(py::reinterpret_borrow<py::object>(dictionary));
      for_each(seen, [&](PyObject* key, PyObject* value) {
        seen.entries.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
        return true;
      });
    }
    for (const py::handle object : objects) {
      objects_.emplace_back(py::reinterpret_borrow<py::object>(object), py::type::of(object));
    }
    for (const py::handle dictionary : empty) empty_.push_back(py::reinterpret_borrow<py::object>(dictionary));
    for (const py::handle tensor : tensors) {
      const bool is_matrix = py::cast<int>(tensor.attr("ndim")) > 1;
      tensors_.push_back({py::reinterpret_borrow<py::object>(tensor), is_matrix, place_of(tensor, true, is_matrix)});
    }
  }

  bool unchanged() const override {
    for (const auto& dictionary : empty_) {
      if (PyDict_Size(dictionary.ptr()) != 0) return false;
    }
    for (const auto& [object, type] : objects_) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != type.ptr()) return false;
    }
    for (const Dictionary& seen : dictionaries_) {
      const uint64_t version = version_of(seen.dictionary);
      if (version != kNoTag && version == seen.version) continue;
      size_t next = 0;
      const bool same = for_each(seen, [&](PyObject* key, PyObject* value) {
        if (next == seen.entries.size()) return false;
        const auto& [held_key, held_value] = seen.entries[next++];
        return are_same(key, held_key.ptr(), false) && are_same(value, held_value.ptr(), by_identity_);
      });
      if (!same || next != seen.entries.size()) return false;
      seen.version = version;
    }
    for (const auto& [tensor, is_matrix, place] : tensors_) {
      if (place_of(tensor, place.version != kNoVersion, is_matrix) != place) return false;
    }
    return true;
  }

  int traverse(visitproc visit, void* arg) const {
    for (const Dictionary& seen : dictionaries_) {
      Py_VISIT(seen.dictionary.ptr());
      for (const auto& [key, value] : seen.entries) Py_VISIT(value.ptr());
    }
    for (const auto& [object, type] : objects_) Py_VISIT(object.ptr());
    for (const auto& dictionary : empty_) Py_VISIT(dictionary.ptr());
    for (const auto& seen : tensors_) Py_VISIT(seen.tensor.ptr());
    return 0;
  }
  void clear() {
    dictionaries_.clear();
    objects_.clear();
    empty_.clear();
    tensors_.clear();
  }

 private:
  struct Dictionary {
    explicit Dictionary(py::object given) : dictionary(std::move(given)) {}
    py::object dictionary;
    std::vector<std::pair<py::object, py::object>> entries;
    mutable uint64_t version = kNoTag;  // that it had when it was found to hold this
  };
  struct Place {
    int64_t version, address, contiguous;
    bool operator==(const Place&) const = default;
  };
  struct Seen {
    py::object tensor;
    bool is_matrix;
    Place place;
  };

  // Python 3.11 and 3.12 number the states of all dictionaries: one that has its number still has not been written to.
  static constexpr uint64_t kNoTag = 0;

  static uint64_t version_of(const py::object& dictionary) {
#if PY_VERSION_HEX < 0x030d0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    return reinterpret_cast<PyDictObject*>(dictionary.ptr())->ma_version_tag;
#pragma GCC diagnostic pop
#else
    return kNoTag;
#endif
  }

  template <typename Body>
  bool for_each(const Dictionary& seen, Body body) const {
    const bool ignores = &seen == dictionaries_.data() && !ignored_.is_none();
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(seen.dictionary.ptr(), &at, &key, &value);) {
      if (ignores && PyUnicode_Check(key) && PyUnicode_Compare(key, ignored_.ptr()) == 0) continue;
      if (!body(key, value)) return false;
    }
    return true;
  }

  // As Python compares what a dictionary holds: the same object, or an equal one.
  static bool are_same(PyObject* now, PyObject* held, bool by_identity) {
    if (now == held) return true;
    if (by_identity) return false;
    const py::object kept = py::reinterpret_borrow<py::object>(now);
    const int equal = PyObject_RichCompareBool(now, held, Py_EQ);
    if (equal < 0) PyErr_Clear();  // two tensors, or arrays: neither equal nor not
    return equal == 1;
  }

  // A tensor made in inference mode has no version: to ask for it takes microseconds, and ends in an error.
  static constexpr int64_t kNoVersion = -1;

  static Place place_of(const py::handle& tensor, bool has_version, bool is_matrix) {
    static PyObject* const version = PyUnicode_InternFromString("_version");
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyObject* const is_contiguous = PyUnicode_InternFromString("is_contiguous");
    const auto number = [](PyObject* result) -> int64_t {
      if (result == nullptr) {
        PyErr_Clear();
        return kNoVersion;
      }
      const auto value = static_cast<int64_t>(PyLong_AsUnsignedLongLongMask(result));
      Py_DECREF(result);
      return value;
    };
    return {has_version ? number(PyObject_GetAttr(tensor.ptr(), version)) : kNoVersion,
            number(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr)),
            is_matrix ? number(PyObject_CallMethodNoArgs(tensor.ptr(), is_contiguous)) : 1};
  }

  std::vector<Dictionary> dictionaries_;
  bool by_identity_;
  py::object ignored_;
  std::vector<std::pair<py::object, py::object>> objects_;
  std::vector<py::object> empty_;
  std::vector<Seen> tensors_;
};

// So that Python's garbage collector sees what it holds.
void set_up_held(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    return py::cast<Held&>(py::handle(self)).traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    py::cast<Held&>(py::handle(self)).clear();
    return 0;
  };
}

bool all_unchanged(const py::tuple& watched) {
  return std::all_of(watched.begin(), watched.end(),
                     [](const py::handle& one) { return py::cast<const Watched&>(one).unchanged(); });
}

// "0.2.0 in /path/to/_C.so"
std::string library() {
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&library), &info);
  return SAIT_VERSION " in " + std::string(info.dli_fname == nullptr ? "an unknown file" : info.dli_fname);
}

}  // namespace

// An op, for whoever would load another library into this process, which may not be able to import this one.
STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) { m.def("_library() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) { m.impl("_library", sait::boxed<library>); }

PYBIND11_MODULE(SAIT_MODULE, m) {
  using namespace sait::cpu;
  m.doc() = "Build facts and CPU features of sait_kernels; the ops are torch.ops.sait.*";
  m.attr("version") = SAIT_VERSION;
  m.attr("cuda_version") = SAIT_CUDA_VERSION;
  m.attr("cuda_archs") = SAIT_CUDA_ARCHS;
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_head_dims") = std::vector<int64_t>(std::begin(sait::cuda::kHeadDims), std::end(sait::cuda::kHeadDims));
  pybind11::class_<Watched>(m, "Watched").def("unchanged", &Watched::unchanged, "Whether all of it still is so.");
  pybind11::class_<Sample, Watched>(m, "Sample", "Some words of pieces of memory: (address, bytes) each.")
      .def(pybind11::init<std::vector<std::pair<uintptr_t, int64_t>>>());
  pybind11::class_<Held, Watched>(
      m, "Held", pybind11::custom_type_setup(set_up_held),
      "What dictionaries hold, classes of objects, dictionaries that are empty, places of tensors.")
      .def(pybind11::init<py::list, bool, py::object, py::list, py::list, py::list>(), py::arg("dictionaries"),
           py::arg("by_identity"), py::arg("ignored"), py::arg("objects"), py::arg("empty"), py::arg("tensors"));
  m.def("all_unchanged", all_unchanged, "Whether several of these, in a tuple, still are what they were.");
  m.def("poison_memory", sait::poison_memory, "Whether memory that ops allocate on the CPU holds NaN first (tests).");
  m.def("poisoned_bytes", sait::poisoned_bytes, "How many bytes did so far.");
  m.def("best_isa", [] { return isa_name(best_isa()); }, "The widest instruction set of this CPU that kernels use.");
  m.def("isa", [] { return isa_name(isa()); }, "The instruction set in force.");
#ifdef SAIT_WITH_CUDA
  m.def(
      "cuda_versions", [] { return std::pair(sait::cuda::runtime_version(), sait::cuda::driver_version()); },
      "The CUDA runtime in this library, and what the installed driver serves (0: there is none); 13000 is 13.0.");
#endif
  m.def("set_isa", [](const char* name) { set_isa(isa_from_name(name)); }, "Lowers the instruction set (tests).");
}
